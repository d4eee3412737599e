"""A conversation in the terminal, answers appearing as they are made, thinking dimmed."""

from pathlib import Path

from rich.console import Console

from shoal.engine.engine import Engine
from shoal.engine.loading import load_for_generation
from shoal.engine.making import simple_engine
from shoal.engine.request import Request, SamplingParams
from shoal.errors import RequestError
from shoal.text.tokenizer import END_THINK, THINK, StreamDecoder

HIDDEN_TAGS = ("<answer>", "</answer>")


def chat_in_terminal(path: Path | None, *, temperature: float, max_tokens: int) -> None:
    """Ask, answer, until an empty line or end of input.

    Raises:
        RequestError: the model has no tokenizer.
    """
    loaded = load_for_generation(path)
    if loaded.tokenizer is None or loaded.template is None:
        raise RequestError(f"{loaded.path} has no tokenizer.json; chat needs one.")
    console = Console(highlight=False)
    engine = simple_engine(loaded)
    console.print(loaded.card.get("description") or f"model {loaded.path}", style="bold", markup=False)
    for suggestion in loaded.card.get("suggestions", []):
        console.print(f"  try: {suggestion}", markup=False)
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        messages.append({"role": "user", "content": question})
        prompt = tuple(loaded.template.encode(loaded.tokenizer, messages))
        room = engine.max_context - len(prompt)
        if room < 1:
            console.print("the conversation is longer than the model's context; starting afresh", style="dim")
            messages.clear()
            continue
        params = SamplingParams(
            max_tokens=min(max_tokens, room), temperature=temperature, stop_token_ids=(loaded.tokenizer.eos_token_id,)
        )
        answer = _answer(console, engine, StreamDecoder(loaded.tokenizer), Request(prompt_ids=prompt, sampling=params))
        messages.append({"role": "assistant", "content": answer})


def _answer(console: Console, engine: Engine, decoder: StreamDecoder, request: Request) -> str:
    """Print the answer as it comes; returns what stands after the thinking."""
    style, spoken = "", ""
    for event in engine.stream(request):
        if event.token_id is None or event.token_id in request.sampling.stop_token_ids:
            continue
        piece = decoder.push(event.token_id)
        if piece in (THINK, END_THINK):
            style = "dim" if piece == THINK else ""
            console.print()
        elif piece not in HIDDEN_TAGS:
            console.print(piece, end="", style=style, markup=False)
            spoken += piece if not style else ""
    console.print(decoder.finish())
    return spoken
