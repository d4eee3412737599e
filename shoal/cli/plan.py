"""What would it cost: `shoal plan`."""

from typing import Annotated

import typer

from shoal.cli.root import JsonOption, app


@app.command()
def plan(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="A preset, a published model, a config.json, a model directory, or a run directory."),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option("--fit", help="Hardware: '8x h800', 'h200', '2 cores, 24 GiB'. Default: H800, as DeepSeek had."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on: 14.8T or 14.8e12.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any assumption: power_w=1.1kW, region=china."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Say what a model costs: parameters, memory, hours, money, electricity, and why.

    Example: shoal plan v3 --tokens 14.8T
    """
    from shoal.cli.plan_tables import show_plan
    from shoal.errors import ConfigError
    from shoal.log import print_json
    from shoal.planner.hardware import parse_fit
    from shoal.planner.plan.question import ask
    from shoal.planner.plan.settings import parse_settings
    from shoal.planner.plan.whole import make_plan
    from shoal.recipes.planning import open_model

    if not models:
        raise ConfigError("name a model, for example: shoal plan v3.")
    given = parse_settings([*(settings or []), *([f"tokens={tokens}"] if tokens else [])])
    made = make_plan(ask(open_model(models[0]), parse_fit(fit) if fit else None, given))
    if json_output:
        print_json(made.to_json())
    else:
        show_plan(made)
