"""What a model is worth: how well it foretells a text, and how often it solves problems of a task.

Both in units that can be compared between models: bits per byte does not depend on the tokenizer, pass@k is the unbiased
estimate with an interval over problems.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.engine.engine import Engine
from shoal.engine.loading import LoadedModel, load_for_generation
from shoal.errors import ConfigError
from shoal.model.layers import compute_dtype, set_compute_dtype
from shoal.rl.evaluation import measure_skill
from shoal.rl.rollout import Prompter
from shoal.rl.task_source import open_task
from shoal.text.corpus import read_documents
from shoal.text.packing import Batch
from shoal.text.tokenizer import Tokenizer
from shoal.training.evaluate import evaluate, token_byte_lengths

WINDOW_ROWS = 16
MAX_WINDOW = 512
"""Tokens that a prediction may look back on at most; shorter where the model's context is."""


def evaluate_text(model: Path | None, data: Sequence[Path], *, text_key: str = "text") -> dict[str, Any]:
    """Perplexity, bits per byte and nats per character of the texts, every token once, in windows of up to `MAX_WINDOW`.

    Raises:
        CheckpointError, ConfigError: no such model, or one without tokenizer.
        DataError: no text, or files that cannot be read.
    """
    loaded, tokenizer = _with_tokenizer(model)
    text = "\n\n".join(read_documents(data, text_key=text_key))
    window = min(MAX_WINDOW, loaded.model.config.max_position_embeddings)
    found = evaluate(
        loaded.model, _windows(tokenizer.encode(text), window, tokenizer.bos_token_id), token_byte_lengths(tokenizer)
    )
    return {
        "nats_per_token": found.loss,
        "perplexity": math.exp(min(found.loss, 700.0)),
        "bits_per_byte": found.bits_per_byte,
        "nats_per_character": found.loss * found.num_tokens / len(text),
        "tokens": found.num_tokens,
        "window": window,
        "mtp_acceptance": found.mtp_acceptance,
        "maxvio": found.max_violation,
    }


def evaluate_task(
    model: Path | None,
    task: str,
    *,
    difficulty: int | None = None,
    num_problems: int = 100,
    samples: int = 4,
    max_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """pass@k of sampled answers to held-out problems of a task, with a 95 % interval, and their length.

    Raises:
        TaskError, DataError: see `open_task`.
        ConfigError: nothing to sample, or a model without tokenizer.
    """
    if min(num_problems, samples) < 1:
        raise ConfigError(f"problems={num_problems} and samples={samples} must be at least 1.")
    loaded, tokenizer = _with_tokenizer(model)
    assert loaded.template is not None
    with open_task(task, difficulty=difficulty, seed=seed) as source:
        report = measure_skill(
            Engine(loaded.model),
            Prompter(tokenizer, loaded.template),
            source.sets.problems("eval", num_problems),
            samples_per_problem=samples,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            verifier=source.verifier,
        )
    return {"task": source.name, "pass_at_1": report.pass_at["1"], **report.to_dict()}


def _with_tokenizer(model: Path | None) -> tuple[LoadedModel, Tokenizer]:
    loaded = load_for_generation(model)
    if loaded.tokenizer is None:
        raise ConfigError(f"{loaded.path} has no tokenizer.json; text can only be measured with the model's tokenizer.")
    set_compute_dtype(loaded.model, compute_dtype("auto", loaded.model.embed_tokens.weight.device))
    return loaded, loaded.tokenizer


def _windows(token_ids: list[int], window: int, begin: int) -> list[Batch]:
    """Every token as a label once; the first one is foretold from the begin token."""
    ids = np.array([begin, *token_ids], np.int64)
    starts = list(range(0, len(token_ids), window))
    whole = [start for start in starts if start + window < len(ids)]
    batches = [_batch(ids, whole[i : i + WINDOW_ROWS], window) for i in range(0, len(whole), WINDOW_ROWS)]
    rest = [start for start in starts if start not in set(whole)]
    return batches + [_batch(ids, [start], len(ids) - 1 - start) for start in rest]


def _batch(ids: "np.ndarray[tuple[int], np.dtype[np.int64]]", starts: Sequence[int], length: int) -> Batch:
    token = np.stack([ids[start : start + length] for start in starts])
    label = np.stack([ids[start + 1 : start + 1 + length] for start in starts])
    position = np.broadcast_to(np.arange(length), token.shape)
    return Batch(token_BS=token, label_BS=label, document_BS=np.zeros_like(token), position_BS=position)
