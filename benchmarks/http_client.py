"""A bare client for completions over HTTP/1.1: so little work per token that it leaves the cores to the server."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Answer:
    """What came back, and when."""

    status: int
    text: str = ""
    finish_reason: str | None = None
    completion_tokens: int | None = None
    is_done: bool = False
    """The terminal event came."""
    error: str | None = None
    started_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    """When each piece of text came."""

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the request to the first piece of text."""
        return self.arrivals_s[0] - self.started_s if self.arrivals_s else None


async def complete(url: str, body: dict[str, Any], *, leave_after: int | None = None) -> Answer:
    """Post a completion request and read it to its end.

    Args:
        leave_after: cut the connection after so many pieces of text.
    """
    parts = urlsplit(url)
    payload = json.dumps(body).encode()
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    started_s = time.perf_counter()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 22)
    try:
        writer.write(head.encode() + f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
        status, is_chunked = await _head(reader)
        answer = Answer(status, started_s=started_s)
        chunks = _chunks(reader) if is_chunked else _rest(reader)
        if body.get("stream") and status == 200:
            await _read_events(chunks, answer, leave_after)
        else:
            _read_whole(b"".join([chunk async for chunk in chunks]), answer)
        return answer
    finally:
        writer.transport.abort()


async def get(url: str) -> bytes:
    """The body of a page."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
        _, is_chunked = await _head(reader)
        return b"".join([chunk async for chunk in (_chunks(reader) if is_chunked else _rest(reader))])
    finally:
        writer.transport.abort()


async def _head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    return int(lines[0].split()[1]), "transfer-encoding: chunked" in {line.lower() for line in lines}


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(1 << 16):
        yield data


async def _read_events(chunks: AsyncIterator[bytes], answer: Answer, leave_after: int | None) -> None:
    left_over = b""
    async for chunk in chunks:
        *lines, left_over = (left_over + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                _read_event(line[5:].strip(), answer)
        if leave_after is not None and len(answer.arrivals_s) >= leave_after:
            return


def _read_event(data: bytes, answer: Answer) -> None:
    if data == b"[DONE]":
        answer.is_done = True
        return
    event = json.loads(data)
    answer.error = answer.error or (json.dumps(event["error"]) if "error" in event else None)
    if usage := event.get("usage"):
        answer.completion_tokens = usage["completion_tokens"]
    for choice in event.get("choices", []):
        piece = _piece(choice.get("delta") or choice)
        if piece:
            answer.text += piece
            answer.arrivals_s.append(time.perf_counter())
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


def _read_whole(data: bytes, answer: Answer) -> None:
    try:
        body = json.loads(data)
    except ValueError:
        answer.error = data[:200].decode("utf-8", "replace")
        return
    if "error" in body:
        answer.error = json.dumps(body["error"])
        return
    choice = body["choices"][0]
    answer.text, answer.finish_reason = _piece(choice.get("message") or choice), choice["finish_reason"]
    answer.completion_tokens, answer.is_done = body["usage"]["completion_tokens"], True


def _piece(part: dict[str, Any]) -> str:
    return (part.get("reasoning_content") or "") + (part.get("content") or "") + (part.get("text") or "")
