"""A server that says what a test tells it to, behind the real guard and with the real page, and a browser to look at it.

A trained model cannot be made to write `<script>` on demand; this stands in for one that does. It speaks the protocol of
`shoal.server.chat`; the tests in `test_page.py` click through the same page against the real server.
"""

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles

from shoal.errors import ShoalError
from shoal.server import run_pages
from shoal.server.app import error_response
from shoal.server.guard import PAGE_POLICY
from shoal.server.plan_pages import plan_router

WEB = Path(run_pages.__file__).with_name("web")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 30_000
"""How long a test waits for what must come; a slow machine may take its time."""
USAGE = {
    "prompt_tokens": 70,
    "completion_tokens": 12,
    "total_tokens": 82,
    "prompt_cache_hit_tokens": 64,
    "prompt_cache_miss_tokens": 6,
    "cost_usd": "0.0000123",
    "joules": 4.25,
}


@dataclass
class ScriptedModel:
    """What to answer; tests set it before they ask."""

    answer: str | None = None
    """None says the last user message back."""
    thinking: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Names and arguments of functions it wants called after its text."""
    piece_s: float = 0.0
    """Waiting time before each piece of the stream."""
    hold_after: int | None = None
    """Send so many pieces and then wait for `release()`: what a test sees meanwhile cannot depend on anybody's speed."""
    ending: str = "whole"
    """Or "error" (an error event) or "cut" (the connection ends), both after the first piece."""
    refusal: tuple[int, str] | None = None
    usage: dict[str, Any] = field(default_factory=lambda: dict(USAGE))
    requests: list[dict[str, Any]] = field(default_factory=list)

    def release(self) -> None:
        self.hold_after = None

    def pieces(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        text = body["messages"][-1]["content"] if self.answer is None else self.answer
        thought = [{"reasoning_content": part} for part in in_parts(self.thinking)]
        asked = []
        for index, (name, arguments) in enumerate(self.calls):
            named = {"id": f"call-{index}", "type": "function", "function": {"name": name, "arguments": ""}}
            asked.append({"tool_calls": [{"index": index, **named}]})
            for part in in_parts(arguments):
                asked.append({"tool_calls": [{"index": index, "function": {"arguments": part}}]})
        return thought + [{"content": part} for part in in_parts(text)] + asked

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield b": keep-alive\n\n"
        for number, delta in enumerate(self.pieces(body)):
            while number == self.hold_after:
                await asyncio.sleep(0.01)
            await asyncio.sleep(self.piece_s)
            if number == 1 and self.ending == "cut":
                return
            if number == 1 and self.ending == "error":
                yield event({"error": {"message": "the engine fell over", "type": "server_error"}})
                return
            yield event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield event({"choices": [], "usage": self.usage})
        yield b"data: [DONE]\n\n"


def in_parts(text: str, size: int = 7) -> list[str]:
    """The text as a stream brings it: cut anywhere."""
    return [text[start : start + size] for start in range(0, len(text), size)]


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def scripted_app(model: ScriptedModel, runs_dir: Path | None) -> FastAPI:
    """The page with a scripted model behind it."""
    app = FastAPI()

    @app.middleware("http")
    async def policy(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["Content-Security-Policy"] = PAGE_POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.get("/")
    def page() -> Response:
        return Response((WEB / "index.html").read_bytes(), media_type="text/html")

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/api/page")
    def facts() -> dict[str, Any]:
        return {
            "name": "scripted",
            "description": "",
            "suggestions": ["how many fish?", "<b>bold?</b>"],
            "max_context": 256,
        }

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        model.requests.append(body)
        if model.refusal:
            status, message = model.refusal
            return JSONResponse({"error": {"message": message}}, status_code=status)
        return StreamingResponse(model.stream(body), media_type="text/event-stream")

    app.include_router(plan_router())
    app.add_exception_handler(
        ShoalError, lambda request, error: error_response(request, 400, str(error), "invalid_request_error")
    )
    if runs_dir:
        app.include_router(run_pages.runs_router(runs_dir))
    app.mount("/web", StaticFiles(directory=WEB))
    return app


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def listening(app: FastAPI, port: int) -> Iterator[str]:
    """The app on a port, until the block ends; connections that are still open are cut."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; skips where there is none."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; install Debian's package 'chromium' to run browser tests")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra 'dev')")
    with sync_api.sync_playwright() as playwright:
        sync_api.expect.set_options(timeout=PATIENCE_MS)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened_page(
    browser: Any, url: str, *, allowed: tuple[str, ...] = (), path: str = "/", **options: Any
) -> Iterator[Any]:
    """A page in a context of its own. At its end nothing may have been asked of others, and no script may have failed.

    Args:
        allowed: parts of console errors that the test provokes, such as a refused request.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda request: None if request.url.startswith((url, "blob:", "data:")) else problems.append(request.url),
    )
    page.goto(url + path)
    yield page
    context.close()
    unexpected = [text for text in problems if not any(part in text for part in allowed)]
    assert not unexpected, f"the page complained: {unexpected}"


def ask(page: Any, text: str) -> None:
    """Type and send; returns when the answer has ended and is kept."""
    page.fill("#question", text)
    page.press("#question", "Enter")
    answered(page)


def answered(page: Any) -> None:
    page.wait_for_selector(".message.answer:last-child:not(.growing)")
    page.wait_for_selector("#send", state="visible")


def expect(locator: Any) -> Any:
    """Playwright's assertions, which wait; imported late, so that tests without a browser need no playwright."""
    from playwright.sync_api import expect as expect_of

    return expect_of(locator)


def until(page: Any, script: str, wanted: Any = True) -> None:
    """Asks the page again and again, until it answers what is wanted.

    Playwright's own `wait_for_function` evaluates text inside the page, which the page's policy forbids.
    """
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while (found := page.evaluate(script)) != wanted:
        assert time.monotonic() < deadline, f"{script} still gives {found!r}, not {wanted!r}"
        page.wait_for_timeout(20)


def until_stored(page: Any, claim: str) -> None:
    """Waits until the conversations in the browser's database are as claimed, for instance before a reload.

    Args:
        claim: JavaScript about `records`, a list of conversations.
    """
    until(
        page,
        """() => new Promise((resolve, reject) => {
          const opening = indexedDB.open("shoal", 1);
          opening.onerror = reject;
          opening.onsuccess = () => {
            const reading = opening.result.transaction("conversations").objectStore("conversations").getAll();
            reading.onerror = reject;
            reading.onsuccess = () => { opening.result.close(); const records = reading.result; resolve(CLAIM); };
          };
        })""".replace("CLAIM", claim),
    )
