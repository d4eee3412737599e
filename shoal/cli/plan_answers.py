"""What `shoal plan` was asked for, answered: one question at a time, as JSON values and as a table to show."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.cli import plan_tables as tables
from shoal.errors import ConfigError
from shoal.log import say
from shoal.planner.calibration import load_calibration, measured_utilisation, to_json
from shoal.planner.claims.table import all_claims, claim, claims_json, markdown
from shoal.planner.hardware import Cluster, load_devices, parse_fit
from shoal.planner.plan.compare import compare
from shoal.planner.plan.expert_balance import balance_experts
from shoal.planner.plan.explain import explain
from shoal.planner.plan.question import Question, ask
from shoal.planner.plan.sensitivity import sensitivity
from shoal.planner.plan.settings import Given, parse_settings
from shoal.planner.plan.whole import Plan, make_plan
from shoal.planner.plan.wiring import prices_of, wire, wiring_json
from shoal.planner.published_models import rival
from shoal.recipes.planned_run import plan_run
from shoal.recipes.planning import is_run_directory, measured_loads, open_model


@dataclass(frozen=True, kw_only=True)
class PlanWish:
    """The command line, as it was typed."""

    models: tuple[str, ...] = ()
    fit: str | None = None
    hardware_file: Path | None = None
    tokens: str | None = None
    settings: tuple[str, ...] = ()
    compare: bool = False
    explain: str | None = None
    sensitivity: bool = False
    network: int | None = None
    place: bool = False
    loads: Path | None = None
    calibrate: bool = False
    claims: bool = False
    claim: int | None = None
    markdown: bool = False


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The same twice: for programs and for people."""

    payload: Mapping[str, Any]
    show: Callable[[], None]


def answer(wish: PlanWish) -> Answer:
    """Do what was asked.

    Raises:
        ConfigError, DataError: what cannot be answered; nothing that was typed is silently ignored.
    """
    _refuse_what_would_be_ignored(wish)
    if wish.calibrate:
        return _calibrate()
    if wish.claims:
        return _claims(wish)
    if wish.network is not None:
        return _network(wish.network, wish)
    if not wish.models:
        raise ConfigError("name a model, for example: shoal plan v3.")
    if len(wish.models) == 1 and is_run_directory(wish.models[0]):
        return _run(wish)
    if wish.place:
        return _place(wish)
    plans = [make_plan(_question(name, wish)) for name in wish.models]
    if wish.compare:
        laid = compare(plans)
        return Answer(payload=asdict(laid), show=lambda: tables.show_comparison(laid))
    return _one_plan(plans[0], wish)


def _one_plan(plan: Plan, wish: PlanWish) -> Answer:
    if wish.sensitivity:
        ranked = sensitivity(plan, wish.explain)
        return Answer(payload=asdict(ranked), show=lambda: tables.show_sensitivity(ranked))
    if wish.explain:
        explained = explain(plan, wish.explain)
        return Answer(payload=asdict(explained), show=lambda: tables.show_explanation(explained))
    return Answer(payload=plan.to_json(), show=lambda: tables.show_plan(plan))


def _question(name: str, wish: PlanWish) -> Question:
    """The question; where the hardware is this machine and was calibrated, with the utilisation that it reaches."""
    model, cluster, given = open_model(name), _cluster(wish), _given(wish)
    question = ask(model, cluster, given)
    if cluster is None or model.config is None or not question.is_without_accelerator:
        return question
    calibration = load_calibration()
    if calibration is None:
        return question
    rows = question.settings.whole("sequence_tokens")
    return ask(model, cluster, given, measured_utilisation(calibration, model.config, cluster, rows))


def _cluster(wish: PlanWish) -> Cluster | None:
    known = load_devices(wish.hardware_file) if wish.hardware_file else None
    return parse_fit(wish.fit, known) if wish.fit else None


def _given(wish: PlanWish) -> Given:
    return parse_settings([*wish.settings, *([f"tokens={wish.tokens}"] if wish.tokens else [])])


def _calibrate() -> Answer:
    from shoal.recipes.measure_machine import measure_machine, save_calibration  # loads torch, which no plan needs

    say("measuring this machine for about a minute; leave it alone meanwhile")
    measured = measure_machine()
    where = save_calibration(measured)
    return Answer(payload=to_json(measured), show=lambda: say(f"calibration kept in {where}"))


def _claims(wish: PlanWish) -> Answer:
    found = all_claims() if wish.claim is None else (claim(wish.claim),)

    def show() -> None:
        if wish.markdown:
            sys.stdout.write(markdown(found) + "\n")
        else:
            tables.show_claims(found)

    return Answer(payload={"claims": claims_json(found)}, show=show)


def _network(endpoints: int, wish: PlanWish) -> Answer:
    settings = ask(rival("v3"), None, _given(wish)).settings
    found = wire(endpoints, settings)
    return Answer(payload=wiring_json(found, settings), show=lambda: tables.show_wiring(found, prices_of(settings)))


def _place(wish: PlanWish) -> Answer:
    question = _question(wish.models[0], wish)
    loads = measured_loads(wish.loads) if wish.loads else None
    source = f"measured, {wish.loads}" if wish.loads else ""
    found = balance_experts(question.model.name, question.model.config, question.settings, loads, source)
    return Answer(payload=asdict(found), show=lambda: tables.show_balance(found))


def _run(wish: PlanWish) -> Answer:
    found = plan_run(Path(wish.models[0]), load_calibration())
    return Answer(payload=found.to_json(), show=lambda: tables.show_run(found))


def _refuse_what_would_be_ignored(wish: PlanWish) -> None:
    modes = {
        "--calibrate": wish.calibrate,
        "--claims": wish.claims,
        "--network": wish.network is not None,
        "--place": wish.place,
        "--compare": wish.compare,
        "--explain or --sensitivity": wish.explain is not None or wish.sensitivity,
    }
    chosen = [name for name, is_chosen in modes.items() if is_chosen]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} are different questions; ask one at a time.")
    if wish.markdown and not wish.claims:
        raise ConfigError("--markdown writes the table of claims; use it with --claims.")
    if wish.hardware_file and not wish.fit:
        raise ConfigError(
            "--hardware-file is there, but no --fit names a device of it; add for example --fit '8x my-gpu'."
        )
    is_general = wish.calibrate or wish.claims or wish.network is not None
    if is_general and (wish.models or wish.fit or wish.tokens):
        raise ConfigError(f"{chosen[0]} is about no single model and hardware; leave out model, --fit and --tokens.")
    if len(wish.models) > 1 and not wish.compare:
        raise ConfigError(f"{len(wish.models)} models are named; compare them with --compare, or name one.")
    has_question = wish.fit or wish.tokens or wish.settings or chosen
    if len(wish.models) == 1 and has_question and is_run_directory(wish.models[0]):
        raise ConfigError(
            f"{wish.models[0]} is a run, which is held against this machine's calibration; leave out --fit, --tokens, --set and "
            "other questions, or plan its model: name its config.json."
        )
