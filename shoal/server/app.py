"""The HTTP application: routes, limits, authentication, and errors in the shape clients expect."""

import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from shoal import __version__
from shoal.errors import RequestError, ServerError, ShoalError
from shoal.server.chat import ChatCompletion, ServedModel
from shoal.server.schemas import ChatRequest

WEB = Path(__file__).with_name("web")
MAX_BODY_BYTES = 1 << 20
PAGE_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

Next = Callable[[Request], Awaitable[Response]]


def build_app(served: ServedModel, *, api_key: str | None = None) -> FastAPI:
    """The application for one model. With `api_key` every route but the page and `/health` asks for it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.worker.start()
        yield
        served.worker.stop()

    app = FastAPI(title="Shoal", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next: Next) -> Response:
        """Key, body size, and headers, for every route at once."""
        path = request.url.path
        is_open = path in ("/", "/health") or path.startswith("/web/")
        if api_key is not None and not is_open and not _has_key(request, api_key):
            return error_response(
                401, "no valid API key; send it as 'Authorization: Bearer KEY'.", "authentication_error"
            )
        if int(request.headers.get("content-length") or 0) > MAX_BODY_BYTES:
            return error_response(413, f"the request is larger than {MAX_BODY_BYTES} bytes.", "invalid_request_error")
        response = await call_next(request)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        if is_open:
            response.headers["Content-Security-Policy"] = PAGE_POLICY
        return response

    _add_errors(app)
    _add_routes(app, served)
    app.mount("/web", StaticFiles(directory=WEB), name="web")
    return app


def _add_routes(app: FastAPI, served: ServedModel) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response((WEB / "index.html").read_bytes(), media_type="text/html")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    @app.get("/models", include_in_schema=False)
    async def models() -> dict[str, Any]:
        entry = {"id": served.name, "object": "model", "created": served.created, "owned_by": "shoal"}
        return {"object": "list", "data": [entry]}

    @app.get("/api/page", include_in_schema=False)
    async def page_facts() -> dict[str, Any]:
        facts = {"name": served.name, "description": served.description, "suggestions": served.suggestions}
        return {**facts, "max_context": served.max_context}

    @app.post("/v1/chat/completions")
    @app.post("/chat/completions", include_in_schema=False)
    async def chat_completions(request: Request) -> Response:
        completion = ChatCompletion(served, ChatRequest.model_validate(json.loads(await _body(request))))
        if not completion.body.stream:
            return JSONResponse(await completion.whole())
        events = completion.events()
        first = await anext(events)  # a refusal must still be a status code, not half a stream
        return StreamingResponse(
            _chain(first, events), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return error_response(400, str(error), "invalid_request_error")

    @app.exception_handler(ServerError)
    async def busy(_: Request, error: ServerError) -> Response:
        return error_response(503, str(error), "server_error")

    @app.exception_handler(ShoalError)
    async def other(_: Request, error: ShoalError) -> Response:
        return error_response(400, str(error), "invalid_request_error")

    @app.exception_handler(json.JSONDecodeError)
    @app.exception_handler(UnicodeDecodeError)
    @app.exception_handler(RecursionError)
    async def malformed(_: Request, error: Exception) -> Response:
        return error_response(400, "the body is not valid JSON.", "invalid_request_error")

    @app.exception_handler(ValidationError)
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: ValidationError | RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        return error_response(422, f"{where}: {first['msg']}", "invalid_request_error", param=where)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, str(error.detail), "invalid_request_error")


def error_response(status: int, message: str, kind: str, param: str | None = None) -> JSONResponse:
    """An error in the shape OpenAI's and DeepSeek's clients read."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": kind}}, status_code=status)


async def _body(request: Request) -> bytes:
    """The body, refused as soon as it is too large, whatever its headers say."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request is larger than {MAX_BODY_BYTES} bytes.")
    return data


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in rest:
        yield event


def _has_key(request: Request, api_key: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), api_key.encode())
