"""Who computes what in the next step: continuous batching over pages, without tensors.

A sequence is token ids, of which a prefix is computed: its latents lie in pages of 64 positions. Reading a prompt and
taking a decoding step are then the same thing, "compute the next `count` tokens", and one step may do both: running
decodes come first, what is left of the token budget goes to prompts in chunks (Sarathi-Serve, arXiv 2403.02310), so that
a long prompt delays nobody by more than a chunk.

When pages run out, cached units that nobody reads are given up first, then the sequence that came last is sent back to
the queue: its pages are freed, its tokens kept, and it is computed again later (vLLM's preemption by recompute).
Waiting sequences are admitted by priority, then from whoever has been served the fewest tokens (a virtual token counter
per tenant, arXiv 2401.00588), then in order of arrival.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.engine.pages import PagePool
from shoal.engine.prefix_cache import UNIT_TOKENS, PrefixCache


@dataclass(eq=False)
class Sequence:
    """One sample on its way."""

    request_id: int
    sample: int
    token_ids: list[int]
    """The prompt and everything drawn since."""
    prompt_tokens: int
    tenant: str = ""
    priority: int = 0
    """Higher goes first."""
    computed: int = 0
    """Leading tokens whose latents are in `pages`."""
    pages: list[int] = field(default_factory=list)
    cache_root: bytes = b""
    """Key before the first unit."""
    unit_keys: list[bytes] = field(default_factory=list)
    """Cache keys of the full units so far."""
    cached_units: int = 0
    """Leading units that the prefix cache knows."""
    found_tokens: int = 0
    """Prompt tokens that a cache held, not counting what was found again after a preemption."""
    admitted: int = 0
    """Order of admission; the last one is sent back first."""
    preempted: bool = False
    draft: list[int] = field(default_factory=list)
    """Guesses at the tokens that come next, computed along with a decoding step."""

    @property
    def left(self) -> int:
        """Tokens to compute before the next can be drawn: 1 while decoding."""
        return len(self.token_ids) - self.computed


@dataclass(frozen=True)
class Work:
    """Compute `count` tokens of a sequence from `start` on."""

    sequence: Sequence
    start: int
    count: int
    draws: bool
    """Whether the next token can be drawn after it."""
    draft: tuple[int, ...] = ()
    """Guessed tokens computed after them."""

    @property
    def rows(self) -> int:
        """Tokens computed, guesses included."""
        return self.count + len(self.draft)


@dataclass(frozen=True)
class Found:
    """What the caches held of a sequence's next units."""

    pages: list[int]
    """References taken."""
    is_more: bool = False
    """More may follow: look again in the next step before computing."""


Lookup = Callable[[Sequence], Found]


class Scheduler:
    """Plans steps over a pool of pages.

    Args:
        max_running: sequences at once.
        step_tokens: tokens of one step, decodes included.
        lookup: finds a sequence's next units; asked whenever a prompt stands at the border of a unit.
    """

    def __init__(
        self, pool: PagePool, cache: PrefixCache, *, max_running: int, step_tokens: int, lookup: Lookup
    ) -> None:
        self.pool, self.cache = pool, cache
        self.max_running, self.step_tokens, self.lookup = max_running, step_tokens, lookup
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._waiting: dict[tuple[int, str], deque[Sequence]] = {}
        self._served: dict[str, float] = {}
        self._admissions = 0

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def is_idle(self) -> bool:
        return not self.running and not self._waiting

    def add(self, sequence: Sequence, *, first: bool = False) -> None:
        """Queue a sequence, `first` before its tenant's others. A tenant that was away starts level with the least served one present: idling earns nothing."""
        present = {tenant for _, tenant in self._waiting} | {other.tenant for other in self.running}
        if sequence.tenant not in present:
            floor = min((self._served[tenant] for tenant in present), default=0.0)
            self._served[sequence.tenant] = max(self._served.get(sequence.tenant, 0.0), floor)
        line = self._queue_of(sequence)
        line.appendleft(sequence) if first else line.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            line = self._waiting.get((sequence.priority, sequence.tenant))
            if line and sequence in line:
                line.remove(sequence)
                self._drop_empty(sequence)
        self._free(sequence)
        present = {tenant for _, tenant in self._waiting} | {other.tenant for other in self.running}
        self._served = {tenant: tokens for tenant, tokens in self._served.items() if tenant in present}

    @property
    def num_decoding(self) -> int:
        """Running sequences that have one token to compute."""
        return sum(sequence.left == 1 for sequence in self.running)

    def plan(self, *, with_drafts: bool = True) -> list[Work]:
        """The work of the next step, pages provided; empty when everybody waits, for pages or for what a cache is loading.

        Args:
            with_drafts: whether guesses are computed along.
        """
        budget, preemptions = self.step_tokens, self.preemptions
        planned: list[Work] = []
        for decoding in (True, False):
            for sequence in sorted(self.running, key=_order):
                if (sequence.left == 1) == decoding and sequence in self.running and budget > 0:
                    budget -= self._take(sequence, budget, planned, with_drafts)
        while budget > 0 and preemptions == self.preemptions and self._admit_next():
            budget -= self._take(self.running[-1], budget, planned)
        # Somebody planned early may have been sent back for one of higher priority planned later.
        planned = [work for work in planned if work.sequence in self.running]
        for work in planned:
            self._served[work.sequence.tenant] = self._served.get(work.sequence.tenant, 0.0) + work.count
        return planned

    def done(self, work: Work, accepted: int = 0) -> None:
        """Record that a work's tokens are in their pages, and so many of its guesses were right."""
        work.sequence.computed = work.start + work.count + accepted

    def _take(self, sequence: Sequence, budget: int, planned: list[Work], with_drafts: bool = False) -> int:
        """Plan up to `budget` tokens of a running sequence; 0 when it was sent back or waits for a cache."""
        if sequence.left > 1 and sequence.computed == len(sequence.pages) * UNIT_TOKENS and self._look_up(sequence):
            return 0
        count = min(sequence.left, budget)
        wanted = -(-(sequence.computed + count) // UNIT_TOKENS) - len(sequence.pages)
        while wanted > 0 and not self._allocate(sequence, wanted):
            victim = max(self.running, key=_order)
            self._send_back(victim)
            if victim is sequence:
                return 0
        draft = tuple(sequence.draft) if with_drafts and count == sequence.left == 1 else ()
        # A guess is worth no page, and nobody's place in the step.
        draft = draft[: min(len(sequence.pages) * UNIT_TOKENS - sequence.computed, budget) - count]
        planned.append(Work(sequence, sequence.computed, count, count == sequence.left, draft))
        return count + len(draft)

    def _look_up(self, sequence: Sequence) -> bool:
        """Take what the caches have; whether there may be more in the next step."""
        found = self.lookup(sequence)
        sequence.pages += found.pages
        sequence.computed += len(found.pages) * UNIT_TOKENS
        sequence.cached_units = max(sequence.cached_units, len(sequence.pages) if found.pages else 0)
        if sequence.computed <= sequence.prompt_tokens and not sequence.preempted:
            sequence.found_tokens += len(found.pages) * UNIT_TOKENS
        return found.is_more

    def _allocate(self, sequence: Sequence, count: int) -> bool:
        short = count - self.pool.num_free
        if short > 0:
            self.cache.evict(short)
        if self.pool.num_free < count:
            return False
        sequence.pages += self.pool.allocate(count)
        return True

    def _admit_next(self) -> bool:
        """Admit the next waiting sequence if its whole text fits beside what runs."""
        if not self._waiting or len(self.running) >= self.max_running:
            return False
        line = min(self._waiting, key=lambda line: (-line[0], self._served.get(line[1], 0.0)))
        sequence = self._waiting[line][0]
        needed = -(-(len(sequence.token_ids) + 1) // UNIT_TOKENS)
        if self.running and needed > self.pool.num_free + self.cache.num_evictable:
            return False
        self._waiting[line].popleft()
        self._drop_empty(sequence)
        self._admissions += 1
        sequence.admitted = self._admissions
        self.running.append(sequence)
        return True

    def _send_back(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        self._queue_of(sequence).appendleft(sequence)
        sequence.preempted = True
        self.preemptions += 1

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.draft = [], []
        sequence.computed = sequence.cached_units = 0

    def _queue_of(self, sequence: Sequence) -> "deque[Sequence]":
        return self._waiting.setdefault((sequence.priority, sequence.tenant), deque())

    def _drop_empty(self, sequence: Sequence) -> None:
        if not self._waiting[(sequence.priority, sequence.tenant)]:
            del self._waiting[(sequence.priority, sequence.tenant)]


def _order(sequence: Sequence) -> tuple[int, int]:
    """First to be served; the last in this order is the first to be sent back."""
    return -sequence.priority, sequence.admitted
