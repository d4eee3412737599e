"""Verbs that run a whole recipe or tell what one did: `shoal demo`, `shoal report`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.root import JsonOption, app


@app.command()
def demo(
    run_dir: Annotated[Path, typer.Option(help="Where the run is kept; the same directory resumes.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option(help="Smaller everywhere, same stages: at most 3 minutes.")] = False,
    serve_after: Annotated[bool, typer.Option("--serve/--no-serve", help="Serve the chat page at the end.")] = True,
    port: Annotated[int, typer.Option(help="Port of the chat page.")] = 8000,
    json_output: JsonOption = False,
) -> None:
    """Train, reason, report and chat: the whole recipe on this machine.

    Example: shoal demo --quick --no-serve
    """
    from shoal.log import print_json, say
    from shoal.recipes.demo import demo_config, run_demo

    result = run_demo(run_dir, demo_config(quick=quick))
    say(f"report: {result.report}")
    if json_output:
        print_json({key: str(value) for key, value in asdict(result).items()})
    if serve_after:
        from shoal.server.start import ServeOptions, serve_model

        serve_model(result.model_dir, ServeOptions(port=port))


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")] = Path("runs/demo"),
    json_output: JsonOption = False,
) -> None:
    """Write report.html and report.json of a run.

    Example: shoal report runs/demo
    """
    from shoal.log import print_json, say
    from shoal.report import write_report

    paths = write_report(run_dir)
    say(f"wrote {paths.html} and {paths.json}")
    if json_output:
        print_json({"html": str(paths.html), "json": str(paths.json)})
