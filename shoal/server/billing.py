"""What a request used and what that costs: one bill per request, kept by the ledger while the answer is written.

Prices are those of the moment the request came, money is exact (`planner/prices.py`). Without a ledger file nothing is
kept, but the usage of every answer still says what it would cost.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from decimal import Decimal
from functools import partial
from typing import TypeVar

from shoal.log import say
from shoal.planner.prices import Price, charge, price_at
from shoal.server.access import Account
from shoal.server.keys import now_utc
from shoal.server.ledger import Ledger

PROGRESS_EVERY_S = 1.0
"""How much of an answer a crash may give away for nothing."""


Done = TypeVar("Done")


class Clerk:
    """The one thread that writes to the ledger: entries are opened, noted and settled in the order they were asked for,
    and the event loop never waits for a disk."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shoal-ledger")

    async def do(self, job: Callable[[], Done]) -> Done:
        """Do a job and wait for it; it is done even if the waiting is cut off."""
        return await asyncio.shield(asyncio.wrap_future(self._thread.submit(job)))

    def later(self, job: Callable[[], object]) -> None:
        """Do a job when its turn comes; what goes wrong is said."""
        try:
            self._thread.submit(_saying_errors, job)
        except RuntimeError:  # the server has closed meanwhile
            _saying_errors(job)

    def close(self) -> None:
        """Wait for what is left to do."""
        self._thread.shutdown(wait=True)


def _saying_errors(job: Callable[[], object]) -> None:
    try:
        job()
    except Exception as error:
        say(f"ledger: {error}")


@dataclass
class Counts:
    """Tokens of a request so far."""

    prompt_tokens: int
    found_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    joules: float = 0.0

    @property
    def miss_tokens(self) -> int:
        return self.prompt_tokens - self.found_tokens

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class Bill:
    """The bill of one request.

    Args:
        model: the name in the price table.
    """

    def __init__(
        self,
        request_id: str,
        account: Account,
        model: str,
        prices: tuple[Price, ...],
        ledger: Ledger | None,
        clerk: Clerk,
    ) -> None:
        self.request_id, self.account, self.ledger, self.clerk = request_id, account, ledger, clerk
        self.model, self.at = model, now_utc()
        self.price = price_at(model, self.at, prices)
        self._noted_s: float | None = None

    async def open(self, prompt_tokens: int, max_output_tokens: int) -> None:
        """Enter the request in the ledger before it is served.

        Raises:
            BalanceError: the key cannot pay for it.
        """
        if self.ledger:
            entry = partial(
                self.ledger.open_entry,
                self.request_id,
                self.account.key_id,
                self.model,
                self.at,
                prompt_tokens=prompt_tokens,
                max_output_tokens=max_output_tokens,
            )
            try:
                await self.clerk.do(entry)
            except asyncio.CancelledError:
                self.clerk.later(self._settlement(self.ledger, Counts(prompt_tokens=0)))
                raise

    async def note(self, counts: Counts) -> None:
        """Note how far the answer is: with its first token, and then now and then."""
        now_s = time.monotonic()
        if self.ledger is None or (self._noted_s is not None and now_s - self._noted_s < PROGRESS_EVERY_S):
            return
        self._noted_s = now_s
        note = partial(
            self.ledger.progress,
            self.request_id,
            counts.output_tokens,
            hit_tokens=counts.found_tokens,
            miss_tokens=counts.miss_tokens,
            reasoning_tokens=counts.reasoning_tokens,
            joules=counts.joules,
        )
        await self.clerk.do(note)

    async def close(self, counts: Counts) -> None:
        """Settle."""
        if self.ledger:
            await self.clerk.do(self._settlement(self.ledger, counts))

    def close_later(self, counts: Counts) -> None:
        """Settle without waiting: for a request that is being cancelled."""
        if self.ledger:
            self.clerk.later(self._settlement(self.ledger, counts))

    def _settlement(self, ledger: Ledger, counts: Counts) -> Callable[[], object]:
        return partial(
            ledger.settle,
            self.request_id,
            hit_tokens=counts.found_tokens,
            miss_tokens=counts.miss_tokens,
            output_tokens=counts.output_tokens,
            reasoning_tokens=counts.reasoning_tokens,
            joules=counts.joules,
        )

    def cost_usd(self, counts: Counts) -> Decimal:
        """What the tokens so far cost."""
        return charge(self.price, self.at, counts.found_tokens, counts.miss_tokens, counts.output_tokens)
