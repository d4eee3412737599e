"""`/openapi.json`: every route with what it takes and what it answers, bounds as they are in force.

Routes read their bodies themselves (strict JSON, in a thread), so FastAPI cannot know them; the document is made from the
same models that the routes use.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from shoal import __version__
from shoal.server import answer_schemas as answers
from shoal.server.bounds import published
from shoal.server.limits import RequestLimits
from shoal.server.messages_schemas import CountRequest, MessagesRequest
from shoal.server.responses_schemas import ResponsesRequest
from shoal.server.schemas import ChatRequest, DetokenizeRequest, TextRequest, TokenizeRequest

REFUSALS = {
    400: "A request that cannot be served",
    401: "No valid key",
    402: "The key's money does not cover it",
    408: "The body came too slowly",
    413: "The body is too large",
    422: "A field is out of range",
    429: "More requests than the key may make",
    503: "Not now: too many wait, the server stops, or the engine hangs",
}


@dataclass(frozen=True)
class Operation:
    """One route as it is published."""

    method: str
    path: str
    summary: str
    answer: type[BaseModel] | str
    """A model, or a content type of text."""
    body: type[BaseModel] | None = None
    streams: bool = False
    is_open: bool = False
    """Needs no key."""
    refusals: tuple[int, ...] = ()


_BODY = (400, 408, 413, 422, 429)
_GENERATES = (*_BODY, 402, 503)

OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Chat, OpenAI's and DeepSeek's way. Also at /chat/completions and, for prefix completion, /beta/chat/completions.", answers.ChatAnswer, ChatRequest, streams=True, refusals=_GENERATES),
    Operation("post", "/v1/completions", "Continue a text. Also at /completions.", answers.TextAnswer, TextRequest, streams=True, refusals=_GENERATES),
    Operation("post", "/beta/completions", "Fill the middle between a prompt and a suffix.", answers.TextAnswer, TextRequest, streams=True, refusals=_GENERATES),
    Operation("post", "/v1/responses", "OpenAI's Responses.", answers.ResponsesAnswerBody, ResponsesRequest, streams=True, refusals=_GENERATES),
    Operation("post", "/v1/messages", "Anthropic's Messages. Also at /anthropic/v1/messages.", answers.MessagesAnswerBody, MessagesRequest, streams=True, refusals=_GENERATES),
    Operation("post", "/v1/messages/count_tokens", "Tokens of a Messages prompt.", answers.TokenCount, CountRequest, refusals=_BODY),
    Operation("post", "/tokenize", "Token ids of a text, or of messages as the template sets them.", answers.TokensAnswer, TokenizeRequest, refusals=_BODY),
    Operation("post", "/detokenize", "Text of token ids.", answers.DetokenizeAnswer, DetokenizeRequest, refusals=_BODY),
    Operation("get", "/v1/models", "The served model. Also at /models.", answers.ModelList),
    Operation("get", "/v1/models/{name}", "The served model, by name.", answers.ModelCard, refusals=(404,)),
    Operation("get", "/user/balance", "The key's money.", answers.BalanceAnswer, refusals=(503,)),
    Operation("get", "/health", "Whether the server lives; 503 when a step of the engine hangs.", answers.StatusAnswer, is_open=True, refusals=(503,)),
    Operation("get", "/ready", "Whether it takes requests; 503 while it stops or the engine hangs.", answers.StatusAnswer, is_open=True, refusals=(503,)),
    Operation("get", "/metrics", "Numbers for Prometheus.", "text/plain"),
)  # fmt: skip


def document(limits: RequestLimits) -> dict[str, Any]:
    """The document."""
    models = {op.body for op in OPERATIONS if op.body} | {
        op.answer for op in OPERATIONS if not isinstance(op.answer, str)
    }
    models |= {answers.ErrorAnswer, answers.MessagesErrorAnswer}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, defined = models_json_schema(
        [(model, "validation") for model in ordered], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _published(operation)
    components = {
        "schemas": published(defined["$defs"], limits),
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        },
    }
    info = {"title": "Shoal", "version": __version__, "description": __doc__.splitlines()[0]}
    return {
        "openapi": "3.1.0",
        "info": info,
        "security": [{"bearer": []}, {"header": []}, {}],
        "paths": paths,
        "components": components,
    }


def _published(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any]
    if isinstance(operation.answer, str):
        content = {operation.answer: {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": _reference(operation.answer)}}
    if operation.streams:
        content["text/event-stream"] = {}  # OpenAPI 3.1 has no words for the events of a stream
    errors = answers.MessagesErrorAnswer if operation.path.startswith("/v1/messages") else answers.ErrorAnswer
    refusals = sorted({*operation.refusals, *(() if operation.is_open else (401,))})
    entry: dict[str, Any] = {
        "operationId": f"{operation.method}_{operation.path.strip('/').replace('/', '_').strip('{}')}",
        "summary": operation.summary,
        "responses": {
            "200": {"description": "The answer", "content": content},
            **{str(status): _refusal(status, operation, errors) for status in refusals},
        },
    }
    if operation.body:
        schema = {"application/json": {"schema": _reference(operation.body)}}
        entry["requestBody"] = {"required": True, "content": schema}
    if "{name}" in operation.path:
        entry["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.is_open:
        entry["security"] = []
    return entry


def _refusal(status: int, operation: Operation, errors: type[BaseModel]) -> dict[str, Any]:
    shape = answers.StatusAnswer if operation.answer is answers.StatusAnswer else errors
    description = REFUSALS.get(status, "Nothing by that name")
    return {"description": description, "content": {"application/json": {"schema": _reference(shape)}}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
