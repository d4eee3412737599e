"""Verbs of reinforcement learning: `shoal rl`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.root import JsonOption, app


@app.command()
def rl(
    controls: Annotated[
        bool,
        typer.Option(
            "--controls", help="Also run what must not work: no worked solutions in the base; a random reward."
        ),
    ] = False,
    run_dir: Annotated[Path, typer.Option(help="A demo run to go on from, or a new directory.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option(help="The recipe that demo --quick runs.")] = False,
    json_output: JsonOption = False,
) -> None:
    """R1-Zero reinforcement learning on the demo's task, and its controls.

    Example: shoal rl --controls
    """
    from shoal.log import print_json, say
    from shoal.recipes.demo import demo_config, run_demo

    result = run_demo(run_dir, demo_config(quick=quick), controls=controls)
    say(f"report: {result.report}")
    if json_output:
        print_json({key: str(value) for key, value in asdict(result).items()})
