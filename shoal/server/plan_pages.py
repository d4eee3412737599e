"""What the Plan page asks: plans, their charts, what the assumptions do, and the published claims, all as JSON.

Every route only reads and computes; a question is a handful of short texts, and models are taken by name alone, never by
path, so that nothing of the server's files can be asked about. Questions are worked out in a thread, never on the event loop.
"""

import json
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response

from shoal.planner.claims.table import all_claims, claims_json
from shoal.planner.hardware import DEVICES, parse_fit
from shoal.planner.plan.charts import charts
from shoal.planner.plan.compare import MOST_PLANS, compare
from shoal.planner.plan.explain import all_inputs
from shoal.planner.plan.question import ask
from shoal.planner.plan.sensitivity import sensitivity
from shoal.planner.plan.settings import CHOICES, REGIONS, SETTINGS, parse_settings
from shoal.planner.plan.whole import Plan, make_plan
from shoal.planner.published_models import RIVALS, rival
from shoal.presets import PRESETS

MAX_SETTINGS = 40

Name = Annotated[str, Query(max_length=64)]


def plan_of(
    model: Name = "v3",
    hardware: Name = "",
    tokens: Name = "",
    settings: Annotated[list[str] | None, Query(alias="set", max_length=MAX_SETTINGS)] = None,
) -> Plan:
    """The plan that a query asks for: `?model=v3&hardware=8x+h800&tokens=14.8T&set=pue=1.2&set=region=china`.

    Raises:
        ConfigError: a model, hardware or assumption that is not known or cannot be.
    """
    given = parse_settings([*(settings or []), *([f"tokens={tokens}"] if tokens else [])])
    return make_plan(ask(rival(model), parse_fit(hardware) if hardware else None, given))


AskedPlan = Annotated[Plan, Depends(plan_of)]


def plan_router() -> APIRouter:
    """Routes below `/api/plan`."""
    router = APIRouter(prefix="/api/plan", include_in_schema=False)

    @router.get("/options")
    def options() -> Response:
        return _answer(_options())

    @router.get("")
    def plan(asked: AskedPlan) -> Response:
        return _answer(describe_plan(asked))

    @router.get("/charts")
    def plan_charts(asked: AskedPlan) -> Response:
        return _answer(charts(asked))

    @router.get("/sensitivity")
    def plan_sensitivity(asked: AskedPlan, figure: Name = "") -> Response:
        return _answer(asdict(sensitivity(asked, figure or None)))

    @router.get("/claims")
    def plan_claims() -> Response:
        return _answer({"claims": claims_json(all_claims())})

    @router.get("/compare")
    def plan_compare(
        model: Annotated[list[str], Query(max_length=MOST_PLANS)],
        hardware: Name = "",
        tokens: Name = "",
        settings: Annotated[list[str] | None, Query(alias="set", max_length=MAX_SETTINGS)] = None,
    ) -> Response:
        return _answer(asdict(compare([plan_of(name, hardware, tokens, settings) for name in model])))

    return router


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Everything the page shows of a plan: sections of figures with what is behind them, and the assumptions."""
    question, settings = plan.question, plan.question.settings
    return {
        "model": question.model.name,
        "source": question.model.source,
        "note": question.model.note,
        "hardware": question.cluster.name,
        "is_hardware_given": question.is_hardware_given,
        "sections": [
            {"title": title, "figures": [{**asdict(one), "rests_on": all_inputs(plan, one.name)} for one in figures]}
            for title, figures in plan.sections.items()
        ],
        "assumptions": [
            {"key": key, "label": SETTINGS[key].label, "value": one.value, "unit": one.unit, "source": one.source}
            for key, one in settings.numbers.items()
        ],
        "choices": [{"key": key, "label": CHOICES[key].label, "value": word} for key, word in settings.words.items()],
    }


def _options() -> dict[str, Any]:
    """What may be asked: models, hardware, assumptions with units, bounds and sources, regions."""
    names = [*RIVALS, *(name for name in PRESETS if name not in RIVALS)]
    models = [rival(name) for name in names]
    return {
        "models": [
            {
                "name": one.name,
                "total_params": round(one.total_params),
                "active_params": round(one.active_params),
                "kv_bytes_per_token": one.kv_bytes_per_token(),
                "source": one.source,
                "note": one.note,
            }
            for one in models
        ],
        "hardware": [{**asdict(one), "flops": dict(one.flops)} for one in DEVICES.values()],
        "assumptions": [asdict(one) for one in SETTINGS.values()],
        "choices": [asdict(one) for one in CHOICES.values()],
        "regions": [{"name": name, **asdict(one)} for name, one in REGIONS.items()],
    }


def _answer(payload: dict[str, Any]) -> Response:
    return Response(json.dumps(payload, allow_nan=False), media_type="application/json")
