"""Bounds: each one changes what it says it changes, and is published as it is in force."""

import re
import socket
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import httpx
import pytest

from shoal.errors import ServerError
from shoal.server.limits import RequestLimits, limits_from
from shoal.server.openapi import OPERATIONS
from tests.server.conftest import run_server, tiny_served

MESSAGES = [{"role": "user", "content": "how many fish?"}]
TIGHT = RequestLimits(
    max_body_bytes=4000,
    max_json_depth=6,
    max_json_digits=5,
    max_messages=2,
    max_prompts=2,
    max_tools=1,
    max_samples=2,
    max_stops=1,
    max_stop_characters=3,
    max_top_logprobs=2,
    max_logit_biases=1,
    max_user_id_bytes=4,
    max_schema_characters=10,
    default_max_tokens=3,
    max_stored_responses=1,
    max_read_s=0.3,
    keep_alive_s=0.2,
)


@pytest.fixture(scope="module")
def tight():
    served = tiny_served()
    served.limits = TIGHT
    yield from run_server(served=served)


def post(tight, path="/v1/chat/completions", **fields):
    return httpx.post(f"{tight.url}{path}", json={"messages": MESSAGES, **fields}, timeout=20)


TOOL = {"function": {"name": "f"}}


@pytest.mark.parametrize(
    "path, over, status, limit",
    [
        ("/v1/chat/completions", {"messages": MESSAGES * 3}, 422, "max_messages=2"),
        ("/v1/chat/completions", {"tools": [TOOL] * 2}, 422, "max_tools=1"),
        ("/v1/chat/completions", {"n": 3}, 422, "max_samples=2"),
        ("/v1/chat/completions", {"stop": ["a", "b"]}, 422, "max_stops=1"),
        ("/v1/chat/completions", {"stop": "abcd"}, 422, "max_stop_characters=3"),
        ("/v1/chat/completions", {"stop_token_ids": [1, 2]}, 422, "max_stops=1"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 3}, 422, "max_top_logprobs=2"),
        ("/v1/chat/completions", {"logit_bias": {"1": 1, "2": 1}}, 422, "max_logit_biases=1"),
        ("/v1/chat/completions", {"user_id": "äää"}, 422, "max_user_id_bytes=4"),
        ("/v1/chat/completions", {"response_format": {"type": "regex", "pattern": "a" * 11}}, 422, "max_schema"),
        ("/v1/completions", {"prompt": ["a", "b", "c"]}, 422, "max_prompts=2"),
        ("/v1/chat/completions", {"seed": 123456}, 400, "at most 5"),
        ("/v1/chat/completions", {"x": [[[[[[[]]]]]]]}, 400, "6 levels"),
        ("/v1/chat/completions", {"x": "y" * 5000}, 413, "4000 bytes"),
        ("/v1/messages", {"max_tokens": 1, "messages": MESSAGES * 3}, 422, "max_messages=2"),
        ("/v1/responses", {"input": [{"role": "user", "content": "x"}] * 3}, 422, "max_messages=2"),
    ],
)
def test_a_request_over_a_bound_is_told_which(tight, path, over, status, limit):
    response = post(tight, path, **over)
    assert response.status_code == status
    assert limit in response.json()["error"]["message"]


def test_an_answer_without_a_bound_gets_the_default(tight):
    eos = tight.served.tokenizer.eos_token_id
    assert post(tight, logit_bias={str(eos): -100}).json()["usage"]["completion_tokens"] == 3


def test_only_so_many_responses_are_kept(tight):
    ids = [post(tight, "/v1/responses", input="x").json()["id"] for _ in range(2)]
    assert post(tight, "/v1/responses", input="x", previous_response_id=ids[1]).status_code == 200
    assert post(tight, "/v1/responses", input="x", previous_response_id=ids[0]).status_code == 400


def test_a_body_that_does_not_come_is_given_up(tight):
    host, port = tight.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_waiting_client_gets_empty_lines_and_comments_then_its_answer(tight, monkeypatch):
    engine = type(tight.served.worker.engine)
    step = engine.step

    def slowly(self):
        time.sleep(0.5)
        return step(self)

    monkeypatch.setattr(engine, "step", slowly)
    whole = post(tight, max_tokens=1)
    assert whole.text.startswith("\n") and whole.json()["usage"]["completion_tokens"] == 1
    stream = post(tight, max_tokens=1, stream=True)
    assert stream.text.startswith(": keep-alive\n\n") and stream.text.endswith("data: [DONE]\n\n")


def test_a_client_that_leaves_a_whole_answer_frees_its_pages(running):
    eos = running.served.tokenizer.eos_token_id
    body = {"messages": MESSAGES, "max_tokens": 200, "n": 16, "logit_bias": {str(eos): -100}}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=0.05)
    for _ in range(100):
        if running.served.worker.num_open == 0:
            break
        threading.Event().wait(0.02)
    assert running.served.worker.num_open == 0
    assert running.served.worker.engine.is_idle


def test_published_bounds_are_those_in_force(tight, running):
    for server, limits in ((tight, TIGHT), (running, RequestLimits())):
        schemas = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
        chat = schemas["ChatRequest"]["properties"]
        assert chat["messages"]["maxItems"] == limits.max_messages
        assert chat["n"]["anyOf"][0]["maximum"] == limits.max_samples
        assert chat["logit_bias"]["anyOf"][0]["maxProperties"] == limits.max_logit_biases


def test_limits_are_named_on_the_command_line():
    limits = limits_from(["max_samples=4", "max_queue_s=2.5"])
    assert limits == replace(RequestLimits(), max_samples=4, max_queue_s=2.5)
    assert all(isinstance(getattr(limits, field.name), field.type) for field in fields(limits))
    for pair, part in [
        ("max_sample=4", "did you mean 'max_samples'"),
        ("max_samples=x", "write max_samples=NUMBER"),
        ("max_samples=0", "above 0"),
        ("max_queue_s=inf", "above 0"),
        ("max_queue_s=nan", "above 0"),
    ]:
        with pytest.raises(ServerError, match=part):
            limits_from([pair])


def test_the_operators_page_lists_every_limit_and_every_route():
    page = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([a-z_]+)` \| ([0-9.]+) \|", page, flags=re.MULTILINE))
    assert {name: float(value) for name, value in listed.items()} == {
        field.name: float(getattr(RequestLimits(), field.name)) for field in fields(RequestLimits)
    }
    routes = set(re.findall(r"^\| `(?:GET|POST) (\S+)`", page, flags=re.MULTILINE))
    assert routes == {operation.path for operation in OPERATIONS}
