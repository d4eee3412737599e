"""What a request used and what that costs: one bill per request, kept by the ledger while the answer is written.

Prices are those of the moment the request came, money is exact (`planner/prices.py`). Without a ledger file nothing is
kept, but the usage of every answer still says what it would cost.
"""

import asyncio
import time
from dataclasses import dataclass
from decimal import Decimal

from shoal.planner.prices import Price, charge, price_at
from shoal.server.access import Account
from shoal.server.keys import now_utc
from shoal.server.ledger import Ledger

PROGRESS_EVERY_S = 1.0
"""How much of an answer a crash may give away for nothing."""


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


class Bill:
    """The bill of one request.

    Args:
        model: the name in the price table.
    """

    def __init__(
        self, request_id: str, account: Account, model: str, prices: tuple[Price, ...], ledger: Ledger | None
    ) -> None:
        self.request_id, self.account, self.ledger = request_id, account, ledger
        self.model, self.at = model, now_utc()
        self.price = price_at(model, self.at, prices)
        self._noted_s = time.monotonic()

    async def open(self, prompt_tokens: int, max_output_tokens: int) -> None:
        """Enter the request in the ledger before it is served.

        Raises:
            BalanceError: the key cannot pay for it.
        """
        if self.ledger:
            await asyncio.to_thread(
                self.ledger.open_entry,
                self.request_id,
                self.account.key_id,
                self.model,
                self.at,
                prompt_tokens=prompt_tokens,
                max_output_tokens=max_output_tokens,
            )

    async def note(self, counts: Counts) -> None:
        """Note how far the answer is, now and then."""
        if self.ledger is None or time.monotonic() - self._noted_s < PROGRESS_EVERY_S:
            return
        self._noted_s = time.monotonic()
        await asyncio.to_thread(
            self.ledger.progress,
            self.request_id,
            counts.output_tokens,
            hit_tokens=counts.found_tokens,
            miss_tokens=counts.miss_tokens,
            reasoning_tokens=counts.reasoning_tokens,
            joules=counts.joules,
        )

    def close(self, counts: Counts) -> None:
        """Settle. Not awaited: it must happen even while the request is being cancelled."""
        if self.ledger:
            self.ledger.settle(
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
