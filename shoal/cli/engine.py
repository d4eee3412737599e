"""Verbs that run a model here and now: `shoal generate`, `shoal chat`."""

import sys
from typing import Annotated

import typer

from shoal.cli.root import JsonOption, ModelArgument, app


@app.command()
def generate(
    model: ModelArgument = None,
    prompt: Annotated[str | None, typer.Option(help="Text of one user turn.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids instead, comma-separated.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Generated tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that reach this together.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal tokens.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Complete one prompt.

    Example: shoal generate runs/demo --prompt "Mia has 37 shells, finds 8. How many shells now?"
    """
    from shoal.engine.one_prompt import complete_one
    from shoal.log import print_json

    result = complete_one(
        model,
        prompt=prompt,
        prompt_ids=prompt_ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    if json_output:
        print_json(result)
    else:
        sys.stdout.write((str(result["text"]) if result["text"] is not None else str(result["token_ids"])) + "\n")


@app.command()
def chat(
    model: ModelArgument = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.6,
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer at most.")] = 256,
) -> None:
    """Talk to a model in the terminal.

    Example: shoal chat runs/demo
    """
    from shoal.engine.terminal_chat import chat_in_terminal

    chat_in_terminal(model, temperature=temperature, max_tokens=max_tokens)
