"""The HTTP application: routes, errors in the shape clients expect, and one guard around all of it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from shoal import __version__
from shoal.errors import RequestError, ShoalError
from shoal.log import say
from shoal.server.access import ANYBODY, Access, Account, Turnstile
from shoal.server.body import parse_json
from shoal.server.chat import ChatCompletion
from shoal.server.completions import TextCompletion
from shoal.server.engine_numbers import serving_numbers
from shoal.server.errors import refusal_of
from shoal.server.events import error_body
from shoal.server.generation import ServedModel
from shoal.server.guard import Guard, SlowBodyError, TooLargeError
from shoal.server.messages import MessagesAnswer
from shoal.server.messages_schemas import CountRequest, MessagesRequest
from shoal.server.metrics import CONTENT_TYPE, Metrics, Number
from shoal.server.openapi import document
from shoal.server.plan_pages import plan_router
from shoal.server.responses import ResponseMemory, ResponsesAnswer
from shoal.server.responses_schemas import ResponsesRequest
from shoal.server.run_pages import runs_router
from shoal.server.schemas import ChatRequest, DetokenizeRequest, TextRequest, TokenizeRequest
from shoal.server.streaming import CLIENT_LEFT, Answer, respond
from shoal.server.turn import prompt_of

WEB = Path(__file__).with_name("web")

AnyBody = TypeVar("AnyBody", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What an operator decides."""

    access: Access = field(default_factory=Access)
    access_log: bool = False
    runs_dir: Path | None = None
    """Shown on the Runs page; None shows none."""


def build_app(served: ServedModel, options: ServerOptions | None = None) -> FastAPI:
    """The application for one model."""
    options = options or ServerOptions()
    metrics = served.metrics = served.metrics or Metrics(served.name, lambda: engine_numbers(served))

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
        turnstile=Turnstile(),
        metrics=metrics,
        limits=served.limits,
        access_log=options.access_log,
    )
    app.openapi = lambda: document(served.limits)  # type: ignore[method-assign]
    _add_errors(app)
    _add_pages(app, served)
    app.include_router(plan_router())
    if options.runs_dir is not None:
        app.include_router(runs_router(options.runs_dir))
    _add_state(app, served, metrics)
    _add_models(app, served)
    _add_tokens(app, served)
    _add_generating(app, served)
    app.mount("/web", StaticFiles(directory=WEB), name="web")
    return app


def engine_numbers(served: ServedModel) -> dict[str, Number]:
    """What the engine says of itself, by vLLM's names."""
    stats = getattr(served.worker.engine, "stats", None)
    numbers: dict[str, Number] = {
        "num_requests_open": served.worker.num_open,
        "engine_restarts_total": served.worker.restarts,
        "engine_failed_steps_total": served.worker.failed_steps,
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


def _add_state(app: FastAPI, served: ServedModel, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether the server lives: 503 when a step of the engine hangs, so that a supervisor restarts it."""
        trouble = served.worker.trouble()
        return JSONResponse({"status": trouble or "ok"}, status_code=503 if trouble else 200)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether new requests are taken."""
        trouble = "the server is being stopped" if served.is_draining else served.worker.trouble()
        return JSONResponse({"status": trouble or "ok"}, status_code=503 if trouble else 200)

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

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


def _add_models(app: FastAPI, served: ServedModel) -> None:
    """Model lists that OpenAI's and Anthropic's clients both read."""
    card = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "shoal",
        "max_model_len": served.max_context,
        "type": "model",
        "display_name": served.name,
        "created_at": datetime.fromtimestamp(served.created, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }

    @app.get("/v1/models")
    @app.get("/models")
    async def models() -> dict[str, Any]:
        """The served model."""
        return {"object": "list", "data": [card], "has_more": False, "first_id": served.name, "last_id": served.name}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        """The served model, by name."""
        if name != served.name:
            raise HTTPException(404, f"no model {name[:100]!r} here; this server has {served.name!r}.")
        return card


def _add_tokens(app: FastAPI, served: ServedModel) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        """Token ids of a text, or of messages as the template sets them."""
        body = await read_body(request, TokenizeRequest, served)
        if (body.text is None) == (body.messages is None):
            raise RequestError("give either 'text' or 'messages'.")
        if body.messages is None:
            ids = await asyncio.to_thread(served.tokenizer.encode, body.text or "")
        elif not body.messages:
            raise RequestError("messages is empty; give at least one.")
        else:
            chat = ChatRequest(messages=body.messages, tools=body.tools)
            ids = await asyncio.to_thread(prompt_of, served, chat)
        return {"count": len(ids), "tokens": ids, "max_model_len": served.max_context}

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        """Text of token ids."""
        body = await read_body(request, DetokenizeRequest, served)
        if body.tokens and max(body.tokens) >= served.tokenizer.vocab_size:
            raise RequestError(
                f"token {max(body.tokens)} is none of this model's, which are 0..{served.tokenizer.vocab_size - 1}."
            )
        return {"text": await asyncio.to_thread(served.tokenizer.decode, body.tokens)}

    @app.post("/v1/messages/count_tokens")
    @app.post("/anthropic/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> dict[str, Any]:
        """Tokens of a Messages prompt."""
        body = await read_body(request, CountRequest, served)
        ids = await asyncio.to_thread(lambda: prompt_of(served, body.as_chat()))
        return {"input_tokens": len(ids)}


def _add_generating(app: FastAPI, served: ServedModel) -> None:
    """The routes that make the model write. Prompts are made in threads: a long one must not hold up the others."""
    memory = ResponseMemory(served.limits.max_stored_responses)

    async def serve(request: Request, stream: bool | None, make: Callable[[], Answer]) -> Response:
        answer = await asyncio.to_thread(make)
        return await respond(answer, request, stream=bool(stream), keep_alive_s=served.limits.keep_alive_s)

    @app.post("/v1/chat/completions")
    @app.post("/chat/completions")
    @app.post("/beta/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """Chat, OpenAI's and DeepSeek's way."""
        body = await read_body(request, ChatRequest, served)
        return await serve(request, body.stream, lambda: ChatCompletion(served, body, account_of(request)))

    @app.post("/v1/completions")
    @app.post("/completions")
    @app.post("/beta/completions")
    async def text_completions(request: Request) -> Response:
        """Plain continuation of a text, and filling in the middle."""
        body = await read_body(request, TextRequest, served)
        return await serve(request, body.stream, lambda: TextCompletion(served, body, account_of(request)))

    @app.post("/v1/responses")
    @app.post("/responses")
    async def responses(request: Request) -> Response:
        """OpenAI's Responses."""
        body = await read_body(request, ResponsesRequest, served)
        return await serve(request, body.stream, lambda: ResponsesAnswer(served, body, memory, account_of(request)))

    @app.post("/v1/messages")
    @app.post("/anthropic/v1/messages")
    async def messages(request: Request) -> Response:
        """Anthropic's Messages."""
        body = await read_body(request, MessagesRequest, served)
        return await serve(request, body.stream, lambda: MessagesAnswer(served, body, account_of(request)))


async def read_body(request: Request, kind: type[AnyBody], served: ServedModel) -> AnyBody:
    """The validated body. Read whole, parsed in a thread: ten megabytes of JSON must not hold up the others."""
    data, limits = await request.body(), served.limits
    return await asyncio.to_thread(lambda: kind.model_validate(parse_json(data, limits), context=limits))


def account_of(request: Request) -> Account:
    """Who asks, as the guard found out."""
    account: Account = request.scope.get("state", {}).get("account", ANYBODY)
    return account


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return error_response(request, error.status_code, str(error.detail), "invalid_request_error")

    @app.exception_handler(TooLargeError)
    async def too_large(request: Request, error: TooLargeError) -> Response:
        return error_response(request, 413, str(error), "invalid_request_error")

    @app.exception_handler(SlowBodyError)
    async def too_slow(request: Request, error: SlowBodyError) -> Response:
        return error_response(request, 408, str(error), "timeout_error")

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_LEFT)

    async def refused(request: Request, error: Exception) -> Response:
        refusal = refusal_of(error)
        if refusal.status == 500:
            say(f"a request failed: {type(error).__name__}: {error}")
        return error_response(request, refusal.status, refusal.message, refusal.kind, refusal.param)

    for kind in (ShoalError, ValidationError, RequestValidationError, Exception):
        app.add_exception_handler(kind, refused)


def error_response(request: Request, status: int, message: str, kind: str, param: str | None = None) -> JSONResponse:
    """An error in the shape the route's clients read."""
    return JSONResponse(error_body(message, kind, param, path=request.url.path), status_code=status)
