"""The engine's thread: the one place that touches the model while the server runs.

Requests come in from the event loop, tokens go out to it; in between the thread steps the engine, so that requests join
and leave a running batch. A step that fails ends the requests it was working on; a thread that dies is started again; a
step that hangs is seen from outside (`stuck_for_s`).

Every step's energy is shared among the requests in proportion to the tokens that were computed for them.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from shoal.engine.request import Request, TokenEvent
from shoal.errors import RequestError, ServerError
from shoal.log import say
from shoal.planner.energy import EnergyMeter

IDLE_POLL_S = 0.05


class StepEngine(Protocol):
    """What the worker needs of an engine."""

    max_context: int

    def add(self, request: Request) -> int: ...
    def step(self) -> list[TokenEvent]: ...
    def cancel(self, request_id: int) -> None: ...
    @property
    def is_idle(self) -> bool: ...
    @property
    def tokens_of_step(self) -> dict[int, int]:
        """Tokens computed in the last step, by request."""
        ...


@dataclass
class Ticket:
    """One request's way back: events arrive in `events`, the last one of every sample carries a finish reason."""

    request: Request
    loop: asyncio.AbstractEventLoop
    events: "asyncio.Queue[TokenEvent | RequestError]" = field(default_factory=asyncio.Queue)
    request_id: int | None = None
    cancelled: bool = False
    joules: float = 0.0

    def deliver(self, event: "TokenEvent | RequestError") -> None:
        """Hand an event to the event loop; called from the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop has closed: nobody waits any more
            self.cancelled = True


class EngineWorker:
    """Owns the engine. Start it once, submit from any event loop.

    Args:
        max_waiting: requests taken in and not finished; more are told to come back.
    """

    def __init__(self, engine: StepEngine, *, max_waiting: int = 256) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self.restarts = 0
        self._inbox: queue.Queue[Ticket] = queue.Queue()
        self._running: dict[int, Ticket] = {}
        self._stopping = threading.Event()
        self._step_began_s: float | None = None
        self._meter = EnergyMeter()
        self._joules = 0.0
        self._thread = threading.Thread(target=self._supervise, name="shoal-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    @property
    def num_open(self) -> int:
        """Requests submitted and not finished."""
        return self._inbox.qsize() + len(self._running)

    @property
    def energy_kind(self) -> str:
        """Whether joules are measured or modelled."""
        return self._meter.reading().kind

    def stuck_for_s(self) -> float:
        """How long the current step has been running; 0 between steps."""
        began_s = self._step_began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    def submit(self, request: Request) -> Ticket:
        """Put a request in line; read it with `stream`.

        Raises:
            ServerError: too many requests are waiting.
        """
        if self.num_open >= self.max_waiting:
            raise ServerError(f"{self.num_open} requests are waiting; try again in a moment.")
        ticket = Ticket(request, asyncio.get_running_loop())
        self._inbox.put(ticket)
        return ticket

    async def stream(self, ticket: Ticket) -> AsyncGenerator[TokenEvent, None]:
        """Events of a request until all its samples have ended; leaving early cancels it.

        Raises:
            RequestError: the engine refuses the request.
        """
        left = ticket.request.sampling.num_samples
        try:
            while left:
                event = await ticket.events.get()
                if isinstance(event, RequestError):
                    raise event
                left -= event.finish_reason is not None
                yield event
        finally:
            ticket.cancelled = True

    def _supervise(self) -> None:
        """Keep the loop alive whatever happens in it."""
        while not self._stopping.is_set():
            try:
                self._run()
            except BaseException as error:  # a dead thread would leave everybody waiting for ever
                self.restarts += 1
                say(f"engine thread died ({type(error).__name__}: {error}); started again")
                self._fail_all()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._take_in(wait=self.engine.is_idle)
            self._drop_cancelled()
            if self.engine.is_idle:
                continue
            try:
                self._step_began_s = time.monotonic()
                events = self.engine.step()
            except Exception as error:  # whatever broke, the server goes on
                say(f"engine step failed: {type(error).__name__}: {error}; {len(self._running)} requests ended")
                self._fail_all()
                continue
            finally:
                self._step_began_s = None
            self._share_energy()
            for event in events:
                self._pass_on(event)

    def _take_in(self, *, wait: bool) -> None:
        """Move submissions into the engine; block briefly when there is nothing else to do."""
        while True:
            try:
                ticket = self._inbox.get(timeout=IDLE_POLL_S) if wait else self._inbox.get_nowait()
            except queue.Empty:
                return
            if wait:
                self._joules = self._meter.reading().joules  # what idling used is nobody's
            wait = False
            if ticket.cancelled:
                continue
            try:
                ticket.request_id = self.engine.add(ticket.request)
            except RequestError as error:
                ticket.deliver(error)
                continue
            self._running[ticket.request_id] = ticket

    def _drop_cancelled(self) -> None:
        for request_id in [number for number, ticket in self._running.items() if ticket.cancelled]:
            self.engine.cancel(request_id)
            del self._running[request_id]

    def _share_energy(self) -> None:
        joules = self._meter.reading().joules
        spent, self._joules = max(joules - self._joules, 0.0), joules
        computed = self.engine.tokens_of_step
        total = sum(computed.values())
        for request_id, tokens in computed.items():
            if request_id in self._running:
                self._running[request_id].joules += spent * tokens / total

    def _pass_on(self, event: TokenEvent) -> None:
        ticket = self._running.get(event.request_id)
        if ticket is None:
            return
        ticket.deliver(event)
        if event.finish_reason is not None and ticket.request.sampling.num_samples == 1:
            del self._running[event.request_id]

    def _fail_all(self) -> None:
        for request_id, ticket in list(self._running.items()):
            self.engine.cancel(request_id)
            for sample in range(ticket.request.sampling.num_samples):
                ticket.deliver(
                    TokenEvent(request_id=request_id, sample=sample, token_id=None, logprob=0.0, finish_reason="error")
                )
        self._running.clear()
