import json

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from shoal.errors import ShoalError
from shoal.planner.hardware import DEVICES
from shoal.planner.plan.question import ask
from shoal.planner.plan.settings import SETTINGS, parse_settings
from shoal.planner.plan.whole import make_plan
from shoal.planner.published_models import RIVALS, rival
from shoal.presets import PRESETS
from shoal.server.app import error_response
from shoal.server.plan_pages import plan_router


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    app.include_router(plan_router())
    app.add_exception_handler(
        ShoalError, lambda request, error: error_response(request, 400, str(error), "invalid_request_error")
    )
    return TestClient(app)


def figures(answer):
    return {figure["name"]: figure for section in answer["sections"] for figure in section["figures"]}


def test_the_page_and_the_command_give_the_same_figures(client):
    answer = client.get(
        "/api/plan", params={"model": "v3", "tokens": "14.8T", "set": ["pue=1.2", "region=china"]}
    ).json()
    made = make_plan(ask(rival("v3"), None, parse_settings(["tokens=14.8T", "pue=1.2", "region=china"])))
    assert {name: figure["value"] for name, figure in figures(answer).items()} == json.loads(
        json.dumps({name: figure.value for name, figure in made.figures.items()})
    )
    assert {one["key"]: one["value"] for one in answer["assumptions"]}["pue"] == 1.2


def test_every_figure_says_what_it_rests_on(client):
    answer = client.get("/api/plan", params={"model": "v2_lite", "hardware": "2 cores, 24 GiB", "tokens": "1B"}).json()
    keys = {one["key"] for one in answer["assumptions"]} | {one["key"] for one in answer["choices"]}
    found = figures(answer)
    for figure in found.values():
        assert set(figure["rests_on"]) <= keys | set(found)
        assert figure["formula"] and figure["source"] and figure["unit"]
    assert {"tokens", "utilisation_fraction", "active_params"} <= set(found["training_usd"]["rests_on"])


def test_options_list_all_models_hardware_and_assumptions_with_sources(client):
    answer = client.get("/api/plan/options").json()
    assert {one["name"] for one in answer["models"]} == {*RIVALS, *PRESETS}
    assert {one["name"] for one in answer["hardware"]} == set(DEVICES)
    assert {one["key"] for one in answer["assumptions"]} == set(SETTINGS)
    assert all(one["source"] for part in ("models", "hardware", "assumptions", "regions") for one in answer[part])


def test_charts_add_up_to_the_plan(client):
    query = {"model": "v3", "tokens": "14.8T", "hardware": "256x h800"}
    answer, found = (
        client.get("/api/plan/charts", params=query).json(),
        figures(client.get("/api/plan", params=query).json()),
    )
    parts = answer["training_by_part"]
    assert sum(one["flops_per_token"] for one in parts) == pytest.approx(found["training_flops_per_token"]["value"])
    assert sum(one["usd"] for one in parts) == pytest.approx(found["training_usd"]["value"])
    memory = answer["memory_by_part"]
    assert sum(memory["training"]["bytes_by_part"].values()) == found["training_memory_bytes"]["value"]
    assert sum(memory["serving"]["bytes_by_part"].values()) == found["serving_memory_bytes"]["value"]
    assert memory["device_bytes"] == DEVICES["h800"].memory_bytes
    v3 = next(curve for curve in answer["kv_over_context"] if curve["name"] == "v3")
    assert v3["kv_bytes"] == [70_272 * tokens for tokens in v3["context_tokens"]]
    points = answer["cost_over_hit_rate"]["points"]
    assert points[0]["saved_fraction"] == 0 and points[-1]["cost_usd"] == 0
    assert [one["price_usd"] for one in points] == sorted((one["price_usd"] for one in points), reverse=True)


def test_sensitivity_ranks_and_comparison_divides(client):
    ranked = client.get(
        "/api/plan/sensitivity", params={"model": "v3", "tokens": "1T", "figure": "training_usd"}
    ).json()
    spans = [one["span_fraction"] for one in ranked["effects"]]
    assert ranked["effects"][0]["key"] == "utilisation_fraction" and spans == sorted(spans, reverse=True)
    rows = client.get("/api/plan/compare", params={"model": ["v3", "llama-3.1-405b"]}).json()["rows"]
    assert next(row for row in rows if row["name"] == "kv_bytes_per_token")["times"] == [
        1,
        pytest.approx(7.344, abs=1e-3),
    ]


@pytest.mark.parametrize(
    "route, query, status, part",
    [
        ("", {"model": "v9"}, 400, "unknown model"),
        ("", {"model": "/etc/passwd"}, 400, "unknown model"),
        ("", {"model": "v" * 65}, 422, ""),
        ("", {"model": "v3", "hardware": "h900"}, 400, "unknown hardware"),
        ("", {"model": "v3", "tokens": "-1"}, 400, "cannot be"),
        ("", {"model": "v3", "set": "power_w=1.2"}, 400, "1.2 kW would be power_w=1200"),
        ("", {"model": "v3", "set": ["pue=1.1"] * 41}, 422, ""),
        ("/sensitivity", {"model": "v3", "figure": "beauty"}, 400, "no figure 'beauty'"),
        ("/compare", {"model": "v3"}, 400, "cannot be compared"),
        ("/compare", {"model": ["v3"] * 7}, 422, ""),
    ],
)
def test_what_cannot_be_is_refused(client, route, query, status, part):
    answer = client.get(f"/api/plan{route}", params=query)
    assert answer.status_code == status and part in answer.text


def test_only_reading_is_possible(client):
    assert client.post("/api/plan").status_code == 405


def test_a_plan_needs_the_key_where_the_server_has_one(locked):
    url = f"{locked.url}/api/plan?model=demo"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer secret"}).status_code == 200
