"""Verbs of the training room: `shoal pretrain`."""

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.root import JsonOption, app


@app.command()
def pretrain(
    data: Annotated[list[Path], typer.Option(help="Text files or folders (.txt, .jsonl, .parquet); may be repeated.")],
    recipe: Annotated[str, typer.Option(help="Only 'text' so far.")] = "text",
    run_dir: Annotated[Path, typer.Option(help="Where the run is kept; the same directory resumes.")] = Path(
        "runs/text"
    ),
    variant: Annotated[
        str, typer.Option(help="'moe', 'dense', 'gqa', or 'both' for moe and dense side by side.")
    ] = "moe",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting, key=value; may be repeated.")
    ] = None,
    text_key: Annotated[str, typer.Option(help="Field that holds the text in JSON lines and Parquet.")] = "text",
    json_output: JsonOption = False,
) -> None:
    """Pretrain a small model on your own text and measure it on the held-out last tenth.

    Example: shoal pretrain --recipe text --data book.txt --set steps=200
    """
    from shoal.log import print_json
    from shoal.recipes.text import run_text, text_config

    config = text_config(recipe, variant=variant, overrides=set_ or [])
    result = run_text(run_dir, data, config, text_key=text_key)
    if json_output:
        print_json(result)
