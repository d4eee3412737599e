"""Waiting politely: keep-alive lines while a request is queued, a refusal while it can still be a status code.

DeepSeek's API sends comments into a stream and empty lines before a whole answer, so that no proxy takes silence for
death; both are nothing to a parser. A failure before the first byte is an error response; after it, an error event, and
the stream ends as every stream does.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse

from shoal.errors import ShoalError
from shoal.log import say
from shoal.server.chat import DONE

KEEP_ALIVE_S = 10.0
COMMENT = b": keep-alive\n\n"


async def whole_response(answer: Awaitable[dict[str, Any]], keep_alive_s: float = KEEP_ALIVE_S) -> Response:
    """The answer as one JSON document; when it takes long, empty lines go ahead of it."""
    task = asyncio.ensure_future(answer)
    try:
        done, _ = await asyncio.wait([task], timeout=keep_alive_s)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if done:
        return JSONResponse(task.result())
    return StreamingResponse(_after_lines(task, keep_alive_s), media_type="application/json")


async def stream_response(events: AsyncIterator[bytes], keep_alive_s: float = KEEP_ALIVE_S) -> Response:
    """The events as they come. What fails before the first one is raised, so that it becomes a status code."""
    pending = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait([pending], timeout=keep_alive_s)
    except asyncio.CancelledError:
        pending.cancel()
        raise
    if pending.done() and pending.exception() is not None:
        pending.result()
    return StreamingResponse(
        _with_comments(pending, events, keep_alive_s),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _after_lines(task: "asyncio.Task[dict[str, Any]]", keep_alive_s: float) -> AsyncIterator[bytes]:
    try:
        while not task.done():
            yield b"\n"
            await asyncio.wait([task], timeout=keep_alive_s)
        try:
            yield json.dumps(task.result(), ensure_ascii=False).encode()
        except Exception as error:
            yield json.dumps(_failure(error)).encode()
    finally:
        task.cancel()


async def _with_comments(
    pending: "asyncio.Future[bytes]", events: AsyncIterator[bytes], keep_alive_s: float
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
                yield b"data: " + json.dumps(_failure(error)).encode() + b"\n\n"
                yield DONE
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


def _failure(error: Exception) -> dict[str, Any]:
    if not isinstance(error, ShoalError):
        say(f"an answer failed: {type(error).__name__}: {error}")
    message = str(error) if isinstance(error, ShoalError) else "the server failed on this request."
    return {"error": {"message": message, "type": "server_error", "param": None, "code": "server_error"}}
