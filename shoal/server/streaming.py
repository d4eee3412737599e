"""Answers on the wire: empty lines while a request is queued, a refusal while it can still be a status code.

DeepSeek's API sends comments into a stream and empty lines before a whole answer, so that no proxy takes silence for
death; both are nothing to a parser. A failure before the first byte is an error response; after it, an error event, and
the stream ends as every stream does.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from shoal.log import say
from shoal.server.errors import Refusal, refusal_of
from shoal.server.events import error_body

COMMENT = b": keep-alive\n\n"
CLIENT_LEFT = 499
"""The status that nobody reads: it stands in the log and the metrics (nginx's number)."""


class Answer(Protocol):
    """An answer in the words of one API."""

    async def whole(self) -> dict[str, Any]: ...
    def events(self) -> AsyncIterator[bytes]: ...
    def failure(self, status: int, message: str, kind: str) -> list[bytes]:
        """How a stream ends that cannot go on."""
        ...


async def respond(answer: Answer, request: Request, *, stream: bool, keep_alive_s: float) -> Response:
    """The answer in one piece or as it comes. What fails before the first byte is raised, so that it becomes a status code.

    A whole answer that takes long has empty lines go ahead of it.
    """
    events = answer.events()
    first: asyncio.Future[Any] = asyncio.ensure_future(anext(events) if stream else answer.whole())
    if not await _first_wait(first, request, keep_alive_s):
        return Response(status_code=CLIENT_LEFT)
    if first.done() and first.exception() is not None:
        first.result()
    if stream:
        return StreamingResponse(
            _with_comments(first, events, answer, keep_alive_s),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    if first.done():
        return JSONResponse(first.result())
    return StreamingResponse(_after_lines(first, keep_alive_s, request.url.path), media_type="application/json")


async def _first_wait(first: "asyncio.Future[Any]", request: Request, keep_alive_s: float) -> bool:
    """Wait for what comes first, no longer than silence is good; False when the client has left, and the work is given up."""
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([first, gone], timeout=keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        first.cancel()
        raise
    finally:
        gone.cancel()
    if gone.done() and not gone.cancelled() and not first.done():
        first.cancel()
        await asyncio.wait([first])
        return False
    return True


async def _disconnected(request: Request) -> None:
    """Returns when the client has left: the body has been read, so nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _after_lines(task: "asyncio.Future[dict[str, Any]]", keep_alive_s: float, path: str) -> AsyncIterator[bytes]:
    try:
        while not task.done():
            yield b"\n"
            await asyncio.wait([task], timeout=keep_alive_s)
        try:
            yield json.dumps(task.result(), ensure_ascii=False).encode()
        except Exception as error:
            refusal = _failure(error)
            yield json.dumps(error_body(refusal.message, refusal.kind, path=path)).encode()
    finally:
        task.cancel()


async def _with_comments(
    pending: "asyncio.Future[bytes]", events: AsyncIterator[bytes], answer: Answer, keep_alive_s: float
) -> AsyncIterator[bytes]:
    try:
        while True:
            while not pending.done():
                yield COMMENT
                await asyncio.wait([pending], timeout=keep_alive_s)
            try:
                item = pending.result()
            except StopAsyncIteration:
                return
            except Exception as error:
                refusal = _failure(error)
                for last in answer.failure(refusal.status, refusal.message, refusal.kind):
                    yield last
                return
            yield item
            pending = asyncio.ensure_future(anext(events))
            await asyncio.wait([pending], timeout=keep_alive_s)
    finally:
        pending.cancel()
        close: Callable[[], Awaitable[None]] | None = getattr(events, "aclose", None)
        if close is not None:
            await _quietly(close())


async def _quietly(closing: Awaitable[None]) -> None:
    """Close an iterator whose last step may still be winding up."""
    try:
        await closing
    except RuntimeError:
        await asyncio.sleep(0)


def _failure(error: Exception) -> Refusal:
    refusal = refusal_of(error)
    if refusal.status == 500:
        say(f"an answer failed: {type(error).__name__}: {error}")
    return refusal
