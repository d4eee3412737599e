"""The HTTP application: routes, errors in the shape clients expect, and one guard around all of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from shoal import __version__
from shoal.errors import RequestError, ServerError, ShoalError
from shoal.log import say
from shoal.server.access import ANYBODY, Access, Account, Turnstile
from shoal.server.body import BodyError, parse_json
from shoal.server.chat import ChatCompletion
from shoal.server.completions import TextCompletion
from shoal.server.engine_numbers import serving_numbers
from shoal.server.generation import ServedModel
from shoal.server.guard import Guard, TooLargeError
from shoal.server.ledger import BalanceError
from shoal.server.metrics import CONTENT_TYPE, Metrics, Number
from shoal.server.plan_pages import plan_router
from shoal.server.schemas import ChatRequest, TextRequest, TokenizeRequest
from shoal.server.streaming import stream_response, whole_response

WEB = Path(__file__).with_name("web")

AnyBody = TypeVar("AnyBody", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What an operator decides."""

    access: Access = field(default_factory=Access)
    max_body_bytes: int = 8 << 20
    access_log: bool = False
    watchdog_s: float = 300.0
    """A step of the engine that takes longer makes `/health` fail, so that a supervisor restarts the server."""


def build_app(served: ServedModel, options: ServerOptions | None = None) -> FastAPI:
    """The application for one model."""
    options = options or ServerOptions()
    metrics = served.metrics = served.metrics or Metrics(served.name, lambda: engine_numbers(served))
    turnstile = Turnstile()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if served.ledger:
            recovered = await asyncio.to_thread(served.ledger.recover)
            if recovered:
                say(f"ledger: {len(recovered)} requests that a crash had cut off were closed at their last note")
        served.worker.start()
        yield
        await asyncio.to_thread(served.close)

    app = FastAPI(title="Shoal", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        Guard,
        access=options.access,
        turnstile=turnstile,
        metrics=metrics,
        max_body_bytes=options.max_body_bytes,
        access_log=options.access_log,
    )
    _add_errors(app)
    _add_pages(app, served)
    _add_state(app, served, options, metrics)
    _add_completions(app, served)
    app.include_router(plan_router())
    app.mount("/web", StaticFiles(directory=WEB), name="web")
    return app


def engine_numbers(served: ServedModel) -> dict[str, Number]:
    """What the engine says of itself, by vLLM's names."""
    stats = getattr(served.worker.engine, "stats", None)
    numbers: dict[str, Number] = {
        "num_requests_open": served.worker.num_open,
        "engine_restarts_total": served.worker.restarts,
    }
    return numbers if stats is None else numbers | serving_numbers(stats)


def _add_pages(app: FastAPI, served: ServedModel) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response((WEB / "index.html").read_bytes(), media_type="text/html")

    @app.get("/api/page", include_in_schema=False)
    async def page_facts() -> dict[str, Any]:
        facts = {"name": served.name, "description": served.description, "suggestions": served.suggestions}
        return {**facts, "max_context": served.max_context}


def _add_state(app: FastAPI, served: ServedModel, options: ServerOptions, metrics: Metrics) -> None:
    @app.get("/health")
    @app.get("/ready")
    async def health() -> Response:
        """Whether the server lives: 503 when a step of the engine hangs."""
        stuck_s = served.worker.stuck_for_s()
        if stuck_s > options.watchdog_s:
            return JSONResponse({"status": f"the engine has been in one step for {stuck_s:.0f} s"}, status_code=503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    @app.get("/models", include_in_schema=False)
    async def models() -> dict[str, Any]:
        """The served model."""
        entry = {"id": served.name, "object": "model", "created": served.created, "owned_by": "shoal"}
        return {"object": "list", "data": [{**entry, "max_model_len": served.max_context}]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        """The served model, by name."""
        if name != served.name:
            raise HTTPException(404, f"no model {name!r} here; this server has {served.name!r}.")
        return {"id": served.name, "object": "model", "created": served.created, "owned_by": "shoal"}

    @app.get("/user/balance")
    async def balance(request: Request) -> dict[str, Any]:
        """The key's money, in DeepSeek's shape."""
        account = account_of(request)
        if served.ledger is None or account.key_id is None:
            return {"is_available": True, "balance_infos": []}
        left = await asyncio.to_thread(served.ledger.available, account.key_id)
        money = format(left, ".2f")
        info = {"currency": "USD", "total_balance": money, "granted_balance": "0.00", "topped_up_balance": money}
        return {"is_available": left > 0, "balance_infos": [info]}

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        """Token ids of a text, or of messages as the template sets them."""
        body = await read_body(request, TokenizeRequest)
        if (body.text is None) == (body.messages is None):
            raise RequestError("give either 'text' or 'messages'.")
        if body.messages is None:
            ids = await asyncio.to_thread(served.tokenizer.encode, body.text or "")
        else:
            messages = [message.for_template() for message in body.messages]
            ids = await asyncio.to_thread(served.template.encode, served.tokenizer, messages)
        return {"count": len(ids), "tokens": ids, "max_model_len": served.max_context}


def _add_completions(app: FastAPI, served: ServedModel) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_body_schema(ChatRequest))
    @app.post("/chat/completions", include_in_schema=False)
    @app.post("/beta/chat/completions", include_in_schema=False)
    async def chat_completions(request: Request) -> Response:
        """Chat, OpenAI's and DeepSeek's way."""
        body = await read_body(request, ChatRequest)
        completion = await asyncio.to_thread(ChatCompletion, served, body, account_of(request))
        return await stream_response(completion.events()) if body.stream else await whole_response(completion.whole())

    @app.post("/v1/completions", openapi_extra=_body_schema(TextRequest))
    @app.post("/completions", include_in_schema=False)
    @app.post("/beta/completions", include_in_schema=False)
    async def text_completions(request: Request) -> Response:
        """Plain continuation of a text, and filling in the middle."""
        body = await read_body(request, TextRequest)
        completion = await asyncio.to_thread(TextCompletion, served, body, account_of(request))
        return await stream_response(completion.events()) if body.stream else await whole_response(completion.whole())


async def read_body(request: Request, kind: type[AnyBody]) -> AnyBody:
    """The validated body. Read whole, parsed in a thread: ten megabytes of JSON must not hold up the others."""
    data = await request.body()
    return await asyncio.to_thread(lambda: kind.model_validate(parse_json(data)))


def account_of(request: Request) -> Account:
    """Who asks, as the guard found out."""
    account: Account = request.scope.get("state", {}).get("account", ANYBODY)
    return account


def _body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """The body's place in the OpenAPI document, since the route reads it itself."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"type": "object", "required": schema.get("required", [])}}},
        }
    }


def _add_errors(app: FastAPI) -> None:
    refusals: list[tuple[type[Exception], int, str]] = [
        (RequestError, 400, "invalid_request_error"),
        (BodyError, 400, "invalid_request_error"),
        (BalanceError, 402, "insufficient_balance"),
        (ServerError, 503, "server_error"),
        (ShoalError, 400, "invalid_request_error"),
        (TooLargeError, 413, "invalid_request_error"),
    ]
    for kind, status, name in refusals:
        app.add_exception_handler(kind, _refusal(status, name))

    @app.exception_handler(ValidationError)
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: ValidationError | RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:200] or "body"
        return error_response(422, f"{where}: {first['msg']}", "invalid_request_error", param=where)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, str(error.detail), "invalid_request_error")

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        say(f"a request failed: {type(error).__name__}: {error}")
        return error_response(500, "the server failed on this request.", "server_error")


def _refusal(status: int, name: str) -> Any:
    async def refused(_: Request, error: Exception) -> Response:
        return error_response(status, str(error), name)

    return refused


def error_response(status: int, message: str, kind: str, param: str | None = None) -> JSONResponse:
    """An error in the shape OpenAI's and DeepSeek's clients read."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": kind}}, status_code=status)
