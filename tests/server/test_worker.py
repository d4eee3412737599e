"""The engine's thread under engines that fail, hang and refuse: whoever waits is always told, and the next one is served."""

import asyncio
import threading

import pytest

from shoal.engine.request import Request, SamplingParams, TokenEvent
from shoal.errors import RequestError, ServerError
from shoal.server.worker import EngineWorker


class Scripted:
    """An engine whose steps are what a test says; by default each ends every request with one token."""

    max_context = 64

    def __init__(self, *script):
        self.script, self.open, self.tokens_of_step, self.next_id = list(script), set(), {}, 0
        self.may_cancel = True

    @property
    def is_idle(self):
        return not self.open

    def add(self, request):
        if request.tenant == "refused":
            raise RequestError("too long")
        if request.tenant == "breaks":
            raise IndexError("inside")
        self.next_id += 1
        self.open.add(self.next_id)
        return self.next_id

    def cancel(self, request_id):
        if not self.may_cancel:
            raise KeyError(request_id)
        self.open.discard(request_id)

    def step(self):
        what = self.script.pop(0) if self.script else None
        if callable(what):
            what()
        if isinstance(what, BaseException):
            raise what
        self.tokens_of_step = dict.fromkeys(self.open, 1)
        events = [TokenEvent(request_id=i, sample=0, token_id=7, logprob=0.0, finish_reason="stop") for i in self.open]
        self.open.clear()
        return events


def one(tenant=""):
    return Request(prompt_ids=(1,), sampling=SamplingParams(max_tokens=1), tenant=tenant)


async def reason(worker, request=None, **bounds):
    """How a request of one sample ended."""
    events = [event async for event in worker.stream(worker.submit(request or one()), **bounds)]
    return events[-1].finish_reason


def run(worker, story):
    worker.start()
    try:
        return asyncio.run(asyncio.wait_for(story, 20))
    finally:
        worker.stop()


def test_a_failed_step_ends_its_requests_and_the_next_is_served_by_the_same_engine():
    engine = Scripted(RuntimeError("x"))
    worker = EngineWorker(engine, remake=lambda: pytest.fail("not needed"))

    async def story():
        return [await reason(worker), await reason(worker)]

    assert run(worker, story()) == ["error", "stop"]
    assert worker.engine is engine and worker.failed_steps == 1 and worker.restarts == 0


@pytest.mark.parametrize("holds_on", [False, True])
def test_an_engine_that_fails_again_or_does_not_let_go_is_made_anew(holds_on):
    broken, good = Scripted(RuntimeError("x"), RuntimeError("x")), Scripted()
    broken.may_cancel = not holds_on
    worker = EngineWorker(broken, remake=lambda: good)

    async def story():
        return [await reason(worker) for _ in range(3)]

    assert run(worker, story()) == (["error", "stop", "stop"] if holds_on else ["error", "error", "stop"])
    assert worker.engine is good and worker.restarts == 1


def test_a_thread_that_dies_comes_back():
    worker = EngineWorker(Scripted(SystemExit("gone")), remake=Scripted)

    async def story():
        return [await reason(worker), await reason(worker)]

    assert run(worker, story()) == ["error", "stop"]
    assert worker.restarts == 1 and worker.trouble() is not None  # stopped by now


def test_one_requests_trouble_is_nobody_elses():
    worker = EngineWorker(Scripted())

    async def story():
        with pytest.raises(RequestError, match="too long"):
            await reason(worker, one("refused"))
        with pytest.raises(ServerError, match="failed on this request"):
            await reason(worker, one("breaks"))
        return await reason(worker)

    assert run(worker, story()) == "stop"
    assert worker.restarts == 0


def test_waiting_is_bounded_and_a_hanging_step_is_told_to_all_who_wait():
    gate = threading.Event()
    worker = EngineWorker(Scripted(gate.wait), watchdog_s=0.3)

    async def story():
        with pytest.raises(ServerError, match="longer than this server allows"):
            await reason(worker, first_s=0.1)
        waiting = [asyncio.create_task(reason(worker)) for _ in range(3)]
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert "one step" in worker.trouble()
        gate.set()
        while worker.trouble():
            await asyncio.sleep(0.01)
        return ended, await reason(worker)

    ended, after = run(worker, story())
    assert all(isinstance(error, ServerError) and "hangs" in str(error) for error in ended)
    assert after == "stop"


def test_the_end_of_a_drain_is_an_event_for_everybody():
    gate = threading.Event()
    worker = EngineWorker(Scripted(gate.wait))

    async def story():
        waiting = [asyncio.create_task(reason(worker)) for _ in range(3)]
        await asyncio.sleep(0.1)
        worker.end_all("stopped")
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        gate.set()
        return ended

    assert [str(error) for error in run(worker, story())] == ["stopped"] * 3
