"""Complete a single prompt, given as text or as token ids: what `shoal generate` does."""

from pathlib import Path
from typing import Any

from shoal.engine.loading import LoadedModel, load_for_generation
from shoal.engine.making import simple_engine
from shoal.engine.request import Request, SamplingParams
from shoal.errors import RequestError


def complete_one(
    path: Path | None,
    *,
    prompt: str | None,
    prompt_ids: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> dict[str, Any]:
    """Load the model at `path` and complete one prompt.

    Args:
        prompt: one user turn, through the chat template; or
        prompt_ids: comma-separated token ids, taken as they are.
    Returns:
        `token_ids`, `text` (None without a tokenizer), `finish_reason`, `logprobs`.
    Raises:
        RequestError: not exactly one of the two prompts, ids that are no numbers, too long.
    """
    if (prompt is None) == (prompt_ids is None):
        raise RequestError("give either --prompt TEXT or --prompt-ids 5,9,2.")
    loaded = load_for_generation(path)
    ids = parse_ids(prompt_ids) if prompt_ids is not None else _encode(loaded, prompt or "")
    stop = loaded.tokenizer.eos_token_id if loaded.tokenizer else loaded.config.eos_token_id
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop_token_ids=(stop,)
    )
    completion = simple_engine(loaded).generate([Request(prompt_ids=ids, sampling=params)])[0][0]
    return {
        "token_ids": completion.token_ids,
        "text": loaded.tokenizer.decode([i for i in completion.token_ids if i != stop]) if loaded.tokenizer else None,
        "finish_reason": completion.finish_reason,
        "logprobs": completion.logprobs,
    }


def parse_ids(text: str) -> tuple[int, ...]:
    """`"5,9,2"` as numbers.

    Raises:
        RequestError: something between the commas is no whole number.
    """
    ids = []
    for part in text.split(","):
        if not part.strip().isascii() or not part.strip().isdigit() or len(part) > 12:
            raise RequestError(
                f"--prompt-ids holds {part.strip()!r}; give whole numbers separated by commas, such as 5,9,2."
            )
        ids.append(int(part))
    return tuple(ids)


def _encode(loaded: LoadedModel, prompt: str) -> tuple[int, ...]:
    if loaded.tokenizer is None or loaded.template is None:
        raise RequestError(f"{loaded.path} has no tokenizer.json, so text cannot be read; use --prompt-ids.")
    return tuple(loaded.template.encode(loaded.tokenizer, [{"role": "user", "content": prompt}]))
