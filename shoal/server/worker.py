"""The engine's thread: the one place that touches the model while the server runs.

Requests come in from the event loop, tokens go out to it; in between the thread steps the engine, so that requests join
and leave a running batch. A step that fails ends the requests it was working on; an engine that cannot let go of them, or
fails again at once, is made anew; a thread that dies is started again. A step that hangs is seen from outside: whoever
waits for it is told so after the watchdog's time.

Every step's energy is shared among the requests in proportion to the tokens that were computed for them.
"""

import asyncio
import math
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from shoal.engine.request import Request, TokenEvent
from shoal.errors import ServerError, ShoalError
from shoal.log import say
from shoal.planner.energy import EnergyMeter

IDLE_POLL_S = 0.05
PATIENCE_S = 1.0
"""How often whoever waits for a token looks whether the engine hangs."""


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
    """One request's way back: events arrive in `events`, the last one of every sample carries a finish reason. They are no
    more than the tokens that were asked for, so a slow reader holds up nobody."""

    request: Request
    loop: asyncio.AbstractEventLoop
    events: "asyncio.Queue[TokenEvent | ShoalError]" = field(default_factory=asyncio.Queue)
    request_id: int | None = None
    cancelled: bool = False
    joules: float = 0.0


class EngineWorker:
    """Owns the engine. Start it once, submit from any event loop.

    Args:
        max_waiting: requests taken in and not finished; more are told to come back.
        watchdog_s: of one step, after which its requests end.
        remake: makes the engine anew when it is broken; None goes on with the old one.
    """

    def __init__(
        self,
        engine: StepEngine,
        *,
        max_waiting: int = 256,
        watchdog_s: float = 300.0,
        remake: Callable[[], StepEngine] | None = None,
    ) -> None:
        self.engine, self.max_waiting, self.watchdog_s, self.remake = engine, max_waiting, watchdog_s, remake
        self.restarts = self.failed_steps = 0
        self._failed_last = False
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

    def trouble(self) -> str | None:
        """What is wrong with the engine, if anything."""
        if self.stuck_for_s() > self.watchdog_s:
            return f"the engine has been in one step for {self.stuck_for_s():.0f} s"
        return None if self._thread.is_alive() else "the engine's thread has ended"

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

    async def stream(
        self, ticket: Ticket, *, first_s: float = math.inf, whole_s: float = math.inf
    ) -> AsyncGenerator[TokenEvent, None]:
        """Events of a request until all its samples have ended; leaving early cancels it.

        Args:
            first_s: how long to wait for the first event.
            whole_s: how long to wait for the last one.
        Raises:
            RequestError: the engine refuses the request.
            ServerError: it took too long, or a step hangs.
        """
        left = ticket.request.sampling.num_samples
        started_s = time.monotonic()
        has_begun = False
        try:
            while left:
                event = await self._next(ticket, started_s + (whole_s if has_begun else min(first_s, whole_s)))
                if isinstance(event, ShoalError):
                    raise event
                has_begun = True
                left -= event.finish_reason is not None
                yield event
        finally:
            ticket.cancelled = True

    async def _next(self, ticket: Ticket, until_s: float) -> "TokenEvent | ShoalError":
        """The next event; looks up now and then, because a hanging engine sends none."""
        while True:
            left_s = until_s - time.monotonic()
            try:
                return await asyncio.wait_for(ticket.events.get(), min(max(left_s, 0.0), PATIENCE_S))
            except asyncio.TimeoutError:
                pass
            if self.stuck_for_s() > self.watchdog_s:
                return ServerError(f"the engine hangs in a step for {self.stuck_for_s():.0f} s; try again later.")
            if time.monotonic() >= until_s:
                return ServerError("the request took longer than this server allows; try again when it is less busy.")

    def end_all(self, message: str) -> None:
        """End every open request with an error; called from the event loop when a drain has lasted too long."""
        with self._inbox.mutex:
            waiting: list[Ticket] = list(self._inbox.queue)
        _deliver([(ticket, ServerError(message)) for ticket in [*waiting, *list(self._running.values())]])

    def _supervise(self) -> None:
        """Keep the loop alive whatever happens in it."""
        while not self._stopping.is_set():
            try:
                self._run()
            except BaseException as error:  # a dead thread would leave everybody waiting for ever
                self.restarts += 1
                say(f"engine thread died ({type(error).__name__}: {error}); started again")
                self._fail_all()
                self._stopping.wait(IDLE_POLL_S)  # what dies at once must not spin

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
                self.failed_steps += 1
                self._fail_all(broken=self._failed_last)
                self._failed_last = True
                continue
            finally:
                self._step_began_s = None
            self._failed_last = False
            self._share_energy()
            self._pass_on(events)

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
            except ShoalError as error:
                _deliver([(ticket, error)])
                continue
            except Exception as error:  # one request's trouble is nobody else's
                say(f"the engine did not take a request: {type(error).__name__}: {error}")
                _deliver([(ticket, ServerError("the engine failed on this request."))])
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

    def _pass_on(self, events: list[TokenEvent]) -> None:
        deliveries: list[Delivery] = []
        for event in events:
            ticket = self._running.get(event.request_id)
            if ticket is None:
                continue
            deliveries.append((ticket, event))
            if event.finish_reason is not None and ticket.request.sampling.num_samples == 1:
                del self._running[event.request_id]
        _deliver(deliveries)

    def _fail_all(self, *, broken: bool = False) -> None:
        """End all running requests, and the engine itself when it does not let go of them."""
        deliveries: list[Delivery] = []
        for request_id, ticket in list(self._running.items()):
            for sample in range(ticket.request.sampling.num_samples):
                end = TokenEvent(
                    request_id=request_id, sample=sample, token_id=None, logprob=0.0, finish_reason="error"
                )
                deliveries.append((ticket, end))
            try:
                self.engine.cancel(request_id)
            except Exception as error:
                say(f"the engine could not drop a request: {type(error).__name__}: {error}")
                broken = True
        self._running.clear()
        _deliver(deliveries)
        if self.remake is not None and (broken or not self.engine.is_idle):
            say("the engine is broken and made anew")
            self.engine = self.remake()
            self.restarts += 1


Delivery = tuple[Ticket, TokenEvent | ShoalError]


def _deliver(deliveries: list[Delivery]) -> None:
    """Hand events to their event loops, each woken once however many there are; called from the engine's thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
    for ticket, event in deliveries:
        by_loop.setdefault(ticket.loop, []).append((ticket, event))
    for loop, mine in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, mine)
        except RuntimeError:  # the loop has closed: nobody waits any more
            for ticket, _ in mine:
                ticket.cancelled = True


def _put(deliveries: list[Delivery]) -> None:
    for ticket, event in deliveries:
        ticket.events.put_nowait(event)
