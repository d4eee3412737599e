"""The published document is true: routes exist, answers and refusals fit their schemas."""

import httpx
import jsonschema
import pytest

from shoal.server.app import build_app
from shoal.server.openapi import OPERATIONS

MESSAGES = [{"role": "user", "content": "how many fish?"}]
UNPUBLISHED = ("/api/", "/web", "/openapi.json", "/anthropic")
ALIASES = {"/chat/completions", "/beta/chat/completions", "/completions", "/models", "/responses", "/"}
CHAT = {"messages": MESSAGES, "max_tokens": 8, "logprobs": True, "top_logprobs": 2, "seed": 1}

BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "fish", "max_tokens": 8, "logprobs": 1},
    "/beta/completions": {"prompt": "fish", "suffix": "!", "max_tokens": 8},
    "/v1/responses": {"input": "how many fish?", "max_output_tokens": 8},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 8},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/tokenize": {"messages": MESSAGES},
    "/detokenize": {"tokens": [1, 2, 3]},
}


@pytest.fixture(scope="module")
def document(roomy):
    return httpx.get(f"{roomy.url}/openapi.json").json()


def routes(app):
    """Paths of all routes, those of included routers too."""
    paths, left = set(), list(app.routes)
    while left:
        route = left.pop()
        left += getattr(getattr(route, "original_router", None), "routes", [])
        paths.add(getattr(route, "path", "/api/"))
    return paths


def check(document, path, method, response):
    said = document["paths"][path][method]["responses"]
    assert str(response.status_code) in said, response.text
    kind = response.headers["content-type"].split(";")[0]
    schema = said[str(response.status_code)]["content"][kind].get("schema", {})
    resolver = {"components": document["components"], **schema}
    jsonschema.Draft202012Validator(resolver).validate(response.json() if kind.endswith("json") else response.text)


def test_every_route_is_published_or_an_alias(roomy, document):
    served = {path for path in routes(build_app(roomy.served)) if not path.startswith(UNPUBLISHED)}
    assert served - ALIASES == set(document["paths"]) == {operation.path for operation in OPERATIONS}


@pytest.mark.parametrize("path", BODIES)
def test_answers_fit_their_schema_and_bodies_the_requests(roomy, document, path):
    wanted = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator({"components": document["components"], **wanted}).validate(BODIES[path])
    response = httpx.post(f"{roomy.url}{path}", json=BODIES[path])
    assert response.status_code == 200, response.text
    check(document, path, "post", response)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_streams_and_refusals_are_published_too(roomy, document, path):
    check(document, path, "post", httpx.post(f"{roomy.url}{path}", json={**BODIES[path], "stream": True}))
    for content in (b"{", b"{}"):
        response = httpx.post(f"{roomy.url}{path}", content=content)
        assert response.status_code in (400, 422)
        check(document, path, "post", response)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/user/balance", "/health", "/ready", "/metrics"])
def test_reading_routes_fit_their_schema(roomy, document, path):
    published = path.replace("tiny", "{name}")
    check(document, published, "get", httpx.get(f"{roomy.url}{path}"))


def test_tokens_and_text_go_both_ways(roomy):
    text = "how many fish?"
    tokens = httpx.post(f"{roomy.url}/tokenize", json={"text": text}).json()["tokens"]
    assert httpx.post(f"{roomy.url}/detokenize", json={"tokens": tokens}).json() == {"text": text}
    response = httpx.post(f"{roomy.url}/detokenize", json={"tokens": [10**6]})
    assert response.status_code == 400 and "none of this model's" in response.json()["error"]["message"]


def test_every_alias_answers_like_its_original(roomy):
    for alias in ("/chat/completions", "/beta/chat/completions"):
        assert httpx.post(f"{roomy.url}{alias}", json=CHAT).json()["object"] == "chat.completion"
    assert httpx.post(f"{roomy.url}/anthropic/v1/messages", json=BODIES["/v1/messages"]).json()["type"] == "message"
    assert httpx.post(f"{roomy.url}/responses", json=BODIES["/v1/responses"]).json()["object"] == "response"
    assert httpx.get(f"{roomy.url}/models").json() == httpx.get(f"{roomy.url}/v1/models").json()
