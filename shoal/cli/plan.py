"""What would it cost: `shoal plan`."""

from pathlib import Path
from typing import Annotated, Any

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
    hardware_file: Annotated[
        Path | None,
        typer.Option(help="JSON file with devices of your own; an unknown name in --fit shows how it looks."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on: 14.8T or 14.8e12.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any assumption: power_w=1.1kW, region=china."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Lay several models side by side.")] = False,
    explain: Annotated[
        str | None,
        typer.Option("--explain", metavar="FIGURE", help="Formula, inputs, sources and result of one figure."),
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity", help="Rank the assumptions by their effect on --explain's figure, or on the cost."
        ),
    ] = False,
    network: Annotated[
        int | None, typer.Option("--network", metavar="ENDPOINTS", help="Five ways to wire so many network cards.")
    ] = None,
    place: Annotated[
        bool, typer.Option("--place", help="Balance the model's experts over devices (EPLB), before and after.")
    ] = False,
    loads: Annotated[
        Path | None, typer.Option(help="With --place: a run directory whose measured expert loads to use.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine for a minute; plans of runs on it then use that.")
    ] = False,
    claims: Annotated[
        bool, typer.Option("--claims", help="Recompute every published claim about size and cost.")
    ] = False,
    claim: Annotated[int | None, typer.Option("--claim", metavar="NUMBER", help="Recompute one of them.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --claims: the table of docs/claims.md.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Say what a model costs: parameters, memory, hours, money, electricity, and why.

    Example: shoal plan v3 --tokens 14.8T
    """
    from shoal.cli import plan_tables as tables
    from shoal.errors import ConfigError
    from shoal.planner.hardware import load_devices, parse_fit
    from shoal.planner.plan.question import ask
    from shoal.planner.plan.settings import parse_settings
    from shoal.planner.plan.whole import make_plan
    from shoal.recipes.planning import is_run_directory, open_model

    if calibrate:
        _calibrate(json_output)
        return
    if claims or claim is not None:
        _claims(claim, markdown, json_output)
        return
    if network is not None:
        _network(network, settings or [], json_output)
        return
    if not models:
        raise ConfigError("name a model, for example: shoal plan v3.")
    if len(models) > 1 and not compare:
        raise ConfigError(f"{len(models)} models are named; compare them with --compare, or name one.")
    if len(models) == 1 and is_run_directory(models[0]):
        _plan_run(models[0], json_output)
        return
    given = parse_settings([*(settings or []), *([f"tokens={tokens}"] if tokens else [])])
    known = load_devices(hardware_file) if hardware_file else None
    cluster = parse_fit(fit, known) if fit else None
    if place or loads:
        _place(ask(open_model(models[0]), cluster, given), loads, json_output)
        return
    plans = [make_plan(_asked(open_model(name), cluster, given)) for name in models]
    if compare:
        _compare(plans, json_output)
    elif sensitivity:
        _rank(plans[0], explain, json_output)
    elif explain:
        _explain(plans[0], explain, json_output)
    else:
        _show(plans[0].to_json(), json_output, lambda: tables.show_plan(plans[0]))


def _asked(model: Any, cluster: Any, given: Any) -> Any:
    """The question; where the hardware is this machine and was calibrated, with the utilisation that it reaches."""
    from shoal.planner.calibration import load_calibration, measured_utilisation
    from shoal.planner.plan.question import ask

    question = ask(model, cluster, given)
    if cluster is None or model.config is None or not question.is_without_accelerator:
        return question
    calibration = load_calibration()
    if calibration is None:
        return question
    rows = question.settings.whole("sequence_tokens")
    return ask(model, cluster, given, measured_utilisation(calibration, model.config, cluster, rows))


def _calibrate(json_output: bool) -> None:
    from shoal.log import say
    from shoal.planner.calibration import to_json
    from shoal.recipes.measure_machine import measure_machine, save_calibration

    say("measuring this machine for about a minute; leave it alone meanwhile")
    measured = measure_machine()
    where = save_calibration(measured)
    _show(to_json(measured), json_output, lambda: say(f"calibration kept in {where}"))


def _claims(number: int | None, as_markdown: bool, json_output: bool) -> None:
    import sys

    from shoal.cli.plan_tables import show_claims
    from shoal.planner.claims.table import all_claims, claim, claims_json, markdown

    found = all_claims() if number is None else (claim(number),)
    if as_markdown:
        sys.stdout.write(markdown(found) + "\n")
        return
    _show({"claims": claims_json(found)}, json_output, lambda: show_claims(found))


def _network(endpoints: int, settings: list[str], json_output: bool) -> None:
    from shoal.cli.plan_tables import show_wiring
    from shoal.planner.plan.question import ask
    from shoal.planner.plan.settings import parse_settings
    from shoal.planner.plan.wiring import prices_of, wire, wiring_json
    from shoal.planner.published_models import rival

    settled = ask(rival("v3"), None, parse_settings(settings)).settings
    found = wire(endpoints, settled)
    _show(wiring_json(found, settled), json_output, lambda: show_wiring(found, prices_of(settled)))


def _place(question: Any, loads: Path | None, json_output: bool) -> None:
    from dataclasses import asdict

    from shoal.cli.plan_tables import show_balance
    from shoal.planner.plan.expert_balance import balance_experts
    from shoal.recipes.planning import measured_loads

    measured = measured_loads(loads) if loads else None
    source = f"measured, {loads}" if loads else ""
    found = balance_experts(question.model.name, question.model.config, question.settings, measured, source)
    _show(asdict(found), json_output, lambda: show_balance(found))


def _plan_run(path: str, json_output: bool) -> None:
    from shoal.cli.plan_tables import show_run
    from shoal.planner.calibration import load_calibration
    from shoal.recipes.planned_run import plan_run

    found = plan_run(Path(path), load_calibration())
    _show(found.to_json(), json_output, lambda: show_run(found))


def _compare(plans: list[Any], json_output: bool) -> None:
    from dataclasses import asdict

    from shoal.cli.plan_tables import show_comparison
    from shoal.planner.plan.compare import compare

    found = compare(plans)
    _show(asdict(found), json_output, lambda: show_comparison(found))


def _rank(plan: Any, figure: str | None, json_output: bool) -> None:
    from dataclasses import asdict

    from shoal.cli.plan_tables import show_sensitivity
    from shoal.planner.plan.sensitivity import sensitivity

    found = sensitivity(plan, figure)
    _show(asdict(found), json_output, lambda: show_sensitivity(found))


def _explain(plan: Any, figure: str, json_output: bool) -> None:
    from dataclasses import asdict

    from shoal.cli.plan_tables import show_explanation
    from shoal.planner.plan.explain import explain

    found = explain(plan, figure)
    _show(asdict(found), json_output, lambda: show_explanation(found))


def _show(payload: dict[str, Any], json_output: bool, show: Any) -> None:
    from shoal.log import print_json

    if json_output:
        print_json(payload)
    else:
        show()
