"""What every request passes before a route sees it: key, rate, size, and afterwards the headers and the access log.

One ASGI layer around the whole application, so that no route can be forgotten: what may be asked without a key is an
allow-list. The log line names method, path, status, time and account, never what was written.
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from shoal.server.access import Access, AccessError, RateError, Turnstile
from shoal.server.events import error_body
from shoal.server.limits import RequestLimits
from shoal.server.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
OPEN_FOLDER = "/web/"
"""The page's own files: they hold no data, and ask for the key themselves."""

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class TooLargeError(Exception):
    """The body is larger than allowed; raised out of `receive`, answered with 413."""


class SlowBodyError(Exception):
    """The body does not come; raised out of `receive`, answered with 408."""


class Guard:
    """The layer.

    Args:
        access_log: write a line per request to standard error.
    """

    def __init__(
        self,
        app: App,
        *,
        access: Access,
        turnstile: Turnstile,
        metrics: Metrics,
        limits: RequestLimits,
        access_log: bool = False,
    ) -> None:
        self.app, self.access, self.turnstile, self.metrics = app, access, turnstile, metrics
        self.limits, self.access_log = limits, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen = _Seen(scope["path"], self.limits.max_write_s)
        try:
            await self._serve(scope, receive, send, seen)
        finally:
            self.metrics.count_request(seen.route(scope), seen.status)
            if self.access_log:
                _log(scope, seen)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, seen: "_Seen") -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        watched = seen.watching(send)
        is_open = scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER)
        account = None
        if not is_open:
            try:
                account = self.access.account(
                    headers.get(b"authorization", b"").decode("latin-1"),
                    headers.get(b"x-api-key", b"").decode("latin-1"),
                )
            except AccessError as error:
                await refuse(watched, scope, 401, str(error), "authentication_error")
                return
            seen.account = account.name
            scope.setdefault("state", {})["account"] = account
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self.limits.max_body_bytes:
            await refuse(watched, scope, 413, self._too_large(), "invalid_request_error")
            return
        counted = account is not None and scope["method"] == "POST"
        try:
            if counted and account:
                self.turnstile.enter(account)
        except RateError as error:
            await refuse(watched, scope, 429, str(error), "rate_limit_error", retry_after_s=error.retry_after_s)
            return
        try:
            await self.app(scope, self._bounded(receive), watched)
        except TooLargeError as error:
            if seen.status == 0:
                await refuse(watched, scope, 413, str(error), "invalid_request_error")
        finally:
            if counted and account:
                self.turnstile.leave(account)

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` that gives up on a body which is larger than its headers said, or does not come."""
        total = 0
        is_whole = False

        async def bounded() -> Message:
            nonlocal total, is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.limits.max_read_s)
            except asyncio.TimeoutError:
                raise SlowBodyError(
                    f"no part of the body came for {self.limits.max_read_s:.0f} s; send it faster."
                ) from None
            total += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if total > self.limits.max_body_bytes:
                raise TooLargeError(self._too_large())
            return message

        return bounded

    def _too_large(self) -> str:
        return f"the request is larger than {self.limits.max_body_bytes} bytes."


class _Seen:
    """What is known of a request when it has ended."""

    def __init__(self, path: str, max_write_s: float) -> None:
        self.path, self.status, self.account, self.max_write_s = path, 0, "", max_write_s
        self.started_s = time.monotonic()

    def watching(self, send: Send) -> Send:
        """`send` that notes the status, adds the headers every response carries, and gives up on a client that does not
        read."""

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                extra = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
                if self.path in OPEN_PATHS or self.path.startswith(OPEN_FOLDER):
                    extra.append((b"content-security-policy", PAGE_POLICY.encode()))
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            try:
                await asyncio.wait_for(send(message), self.max_write_s)
            except asyncio.TimeoutError:
                raise OSError(f"the client read nothing for {self.max_write_s:.0f} s") from None

        return watched

    def route(self, scope: Scope) -> str:
        """The route's template, so that a scanner's inventions do not become metric labels."""
        route = scope.get("route")
        return str(getattr(route, "path", "unknown"))


async def refuse(
    send: Send, scope: Scope, status: int, message: str, kind: str, *, retry_after_s: float | None = None
) -> None:
    """Answer with an error in the shape the route's clients read."""
    body = json.dumps(error_body(message, kind, path=scope["path"])).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, round(retry_after_s))).encode()))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _log(scope: Scope, seen: _Seen) -> None:
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": seen.status,
        "seconds": round(time.monotonic() - seen.started_s, 3),
        "account": seen.account,
        "client": (scope.get("client") or ("",))[0],
    }
    # JSON escapes what a path might carry to forge a line.
    sys.stderr.write(json.dumps(line) + "\n")
