"""What would it cost: `shoal plan`."""

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.root import JsonOption, app

Models = Annotated[
    list[str] | None,
    typer.Argument(help="A preset, a published model, a config.json, a model directory, or a run directory."),
]
Fit = Annotated[
    str | None,
    typer.Option("--fit", help="Hardware: '8x h800', 'h200', '2 cores, 24 GiB'. Default: H800, as DeepSeek had."),
]
HardwareFile = Annotated[
    Path | None, typer.Option(help="JSON file with devices of your own; an unknown name in --fit shows how it looks.")
]
Tokens = Annotated[str | None, typer.Option(help="Tokens to train on: 14.8T or 14.8e12.")]
SettingTexts = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any assumption: power_w=1.1kW, region=china.")
]
Compare = Annotated[bool, typer.Option("--compare", help="Lay several models side by side.")]
Explain = Annotated[
    str | None, typer.Option("--explain", metavar="FIGURE", help="Formula, inputs, sources and result of one figure.")
]
Sensitivity = Annotated[
    bool, typer.Option("--sensitivity", help="Rank the assumptions by their effect on --explain's figure, or on cost.")
]
Network = Annotated[int | None, typer.Option("--network", metavar="N", help="Five ways to wire N network cards.")]
Place = Annotated[bool, typer.Option("--place", help="Balance the model's experts over devices (EPLB).")]
Loads = Annotated[Path | None, typer.Option(help="With --place: a run directory whose measured expert loads to use.")]
Calibrate = Annotated[
    bool, typer.Option("--calibrate", help="Measure this machine for a minute; plans of runs on it then use that.")
]
Claims = Annotated[bool, typer.Option("--claims", help="Recompute every published claim about size and cost.")]
ClaimNumber = Annotated[int | None, typer.Option("--claim", metavar="NUMBER", help="Recompute one of them.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="With --claims: the table of docs/claims.md.")]


@app.command()
def plan(
    models: Models = None,
    fit: Fit = None,
    hardware_file: HardwareFile = None,
    tokens: Tokens = None,
    settings: SettingTexts = None,
    compare: Compare = False,
    explain: Explain = None,
    sensitivity: Sensitivity = False,
    network: Network = None,
    place: Place = False,
    loads: Loads = None,
    calibrate: Calibrate = False,
    claims: Claims = False,
    claim: ClaimNumber = None,
    markdown: Markdown = False,
    json_output: JsonOption = False,
) -> None:
    """Say what a model costs: parameters, memory, hours, money, electricity, and why.

    Example: shoal plan v3 --tokens 14.8T
    """
    from shoal.cli.plan_answers import PlanWish, answer
    from shoal.log import print_json

    wish = PlanWish(
        models=tuple(models or ()),
        fit=fit,
        hardware_file=hardware_file,
        tokens=tokens,
        settings=tuple(settings or ()),
        compare=compare,
        explain=explain,
        sensitivity=sensitivity,
        network=network,
        place=place or loads is not None,
        loads=loads,
        calibrate=calibrate,
        claims=claims or claim is not None,
        claim=claim,
        markdown=markdown,
    )
    found = answer(wish)
    if json_output:
        print_json(found.payload)
    else:
        found.show()
