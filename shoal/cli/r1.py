"""The R1 pipeline and the bundled model: `shoal r1`, `shoal train-bundled`."""

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.root import JsonOption, app


@app.command()
def r1(
    run_dir: Annotated[Path, typer.Option(help="Where the run is kept; the same directory resumes.")] = Path("runs/r1"),
    quick: Annotated[bool, typer.Option(help="Every stage, too small to show what the paper shows.")] = False,
    json_output: JsonOption = False,
) -> None:
    """The R1 pipeline: Zero, cold start, Dev1, Dev2, rejection sampling, Dev3, R1, distillation, and a table like the paper's.

    Example: shoal r1 --run-dir runs/r1
    """
    import json

    from shoal.log import print_json, say
    from shoal.recipes.r1 import r1_config, run_r1

    say(f"report: {run_r1(run_dir, r1_config(quick=quick))}")
    if json_output:
        print_json(json.loads((run_dir / "r1.json").read_text(encoding="utf-8")))


@app.command("train-bundled")
def train_bundled(
    run_dir: Annotated[Path, typer.Option(help="Where the run is kept; the same directory resumes.")] = Path(
        "runs/bundled"
    ),
    steps: Annotated[int, typer.Option(help="Of training from scratch.")] = 4000,
    json_output: JsonOption = False,
) -> None:
    """Train the model that comes with the package: all task families, with its card.

    Example: shoal train-bundled --run-dir runs/bundled
    """
    from shoal.log import print_json, say
    from shoal.recipes.bundled import bundled_config
    from shoal.recipes.bundled import train_bundled as train

    model = train(run_dir, bundled_config(steps=steps))
    say(f"model: {model}")
    if json_output:
        print_json({"model": str(model)})
