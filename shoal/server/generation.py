"""One request on its way through the server, whatever the API it came by: tokens in, pieces of text out, usage kept.

`Generation` is the part that chat, text completion, Responses and Messages share. It submits the request, reads each
sample's tokens into reasoning and content, observes times, and settles the bill however the request ends: answered, cut
off by the client, or failed.
"""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from shoal.engine.disk_cache import DiskCache
from shoal.engine.request import Request, TokenEvent
from shoal.errors import ServerError
from shoal.planner.prices import PRICES, Price
from shoal.server.access import ANYBODY, Account
from shoal.server.answers import AnswerMemory
from shoal.server.billing import Bill, Clerk, Counts
from shoal.server.ledger import Ledger
from shoal.server.limits import RequestLimits
from shoal.server.metrics import Metrics
from shoal.server.pieces import Call, Piece
from shoal.server.profiles import Profile
from shoal.server.reasoning import AnswerReader
from shoal.server.worker import EngineWorker
from shoal.text.chat_template import ChatTemplate
from shoal.text.tokenizer import Tokenizer

FINISH_REASONS = {"stop": "stop", "length": "length"}
"""The engine's reasons as clients know them; everything else is the server's fault."""


@dataclass(kw_only=True)
class ServedModel:
    """A model with everything the server says about it."""

    name: str
    worker: EngineWorker
    tokenizer: Tokenizer
    template: ChatTemplate
    max_context: int
    description: str = ""
    suggestions: list[str] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))
    prices: tuple[Price, ...] = PRICES
    ledger: Ledger | None = None
    metrics: Metrics | None = None
    disk_cache: DiskCache | None = None
    answers: AnswerMemory = field(default_factory=AnswerMemory)
    limits: RequestLimits = field(default_factory=RequestLimits)
    profile: Profile = "lenient"
    clerk: Clerk = field(default_factory=Clerk)
    is_draining: bool = False
    """Told to stop: running answers end, new ones are refused."""

    def close(self) -> None:
        """Stop the engine, then write out what is still on its way to the disk."""
        self.worker.stop()
        self.clerk.close()
        if self.disk_cache:
            self.disk_cache.close()
        if self.ledger:
            self.ledger.close()


@dataclass
class Sample:
    """One sample as it grows."""

    reader: AnswerReader
    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: int = 0
    logprobs: list[TokenEvent] = field(default_factory=list)
    """Events of the content's tokens, kept when log-probabilities were asked for."""
    finish_reason: str | None = None
    last_token_s: float | None = None

    def add(self, piece: Piece) -> None:
        """Grow by a piece."""
        if piece.kind == "reasoning":
            self.reasoning += piece.text
        elif piece.kind == "content":
            self.content += piece.text
        elif piece.kind == "call":
            self.calls.append(Call("call_" + secrets.token_hex(12), piece.text))
        else:
            self.calls[-1].arguments += piece.text


@dataclass(frozen=True)
class Step:
    """What one event added to one sample. The last step of a sample has `is_end`."""

    sample: int
    pieces: list[Piece]
    event: TokenEvent
    is_end: bool


class Generation:
    """A request with its samples.

    Args:
        readers: one per sample.
        keep_logprobs: whether samples keep the events of their tokens.
    """

    def __init__(
        self,
        served: ServedModel,
        request: Request,
        readers: Sequence[AnswerReader],
        *,
        account: Account = ANYBODY,
        id_prefix: str = "chatcmpl-",
        keep_logprobs: bool = False,
    ) -> None:
        self.served, self.request, self.account = served, request, account
        self.id, self.created = id_prefix + secrets.token_hex(12), int(time.time())
        self.samples = [Sample(reader) for reader in readers]
        self.counts = Counts(prompt_tokens=len(request.prompt_ids))
        self.keep_logprobs = keep_logprobs
        self.bill = Bill(self.id, account, served.name, served.prices, served.ledger, served.clerk)
        self.started_s = time.monotonic()
        self._has_ended = False

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Every sample's growth as it comes. Closing the iterator early cancels the request; the bill is settled anyway.

        The bill of a finished request is on the disk before its last step is handed on: whoever holds a whole answer is
        in the ledger, however the server dies afterwards.

        Raises:
            RequestError: the engine refuses it.
            ServerError: the server is stopping, too many requests are waiting, or it took too long.
            BalanceError: the key cannot pay.
        """
        if self.served.is_draining:
            raise ServerError("the server is being stopped; try again in a moment.")
        sampling = self.request.sampling
        await self.bill.open(self.counts.prompt_tokens, sampling.max_tokens * sampling.num_samples)
        try:
            limits = self.served.limits
            ticket = self.served.worker.submit(self.request)
            events = self.served.worker.stream(ticket, first_s=limits.max_queue_s, whole_s=limits.max_request_s)
            async with aclosing(events):
                async for event in events:
                    self.counts.joules = ticket.joules
                    self.counts.found_tokens = max(
                        self.counts.found_tokens, event.found_tokens if event.sample == 0 else 0
                    )
                    step = self._take(event)
                    if step is None:
                        continue
                    if all(sample.finish_reason for sample in self.samples):
                        await self._end()
                        yield step
                        return
                    await self.bill.note(self.counts)
                    yield step
        finally:
            if not self._has_ended:
                self._forget()

    def usage(self) -> dict[str, Any]:
        """Token counts in OpenAI's and DeepSeek's fields, and what they cost in money and energy."""
        return usage_of(self.counts, self.cost_usd)

    @property
    def cost_usd(self) -> Decimal:
        return self.bill.cost_usd(self.counts)

    def head(self, kind: str) -> dict[str, Any]:
        """What every object of an answer begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": f"fp_{self.served.tokenizer.digest[:10]}",
        }

    def _take(self, event: TokenEvent) -> Step | None:
        """Read an event into its sample; None when the sample had ended, at a stop string for example."""
        sample = self.samples[event.sample]
        if sample.finish_reason is not None:
            return None
        pieces: list[Piece] = []
        if event.token_id is not None:
            self._observe_token(sample)
            sample.tokens += 1
            pieces = sample.reader.push(event.token_id)
            if self.keep_logprobs and not sample.reader.is_thinking:
                sample.logprobs.append(event)
        if event.finish_reason is not None:
            pieces += sample.reader.finish()
            sample.finish_reason = FINISH_REASONS.get(event.finish_reason, "insufficient_system_resource")
            if sample.calls and sample.finish_reason == "stop":
                sample.finish_reason = "tool_calls"
        elif sample.reader.stopped:
            sample.finish_reason = "stop"
        for piece in pieces:
            sample.add(piece)
        self.counts.output_tokens = sum(other.tokens for other in self.samples)
        self.counts.reasoning_tokens = sum(other.reader.reasoning_tokens for other in self.samples)
        return Step(event.sample, pieces, event, sample.finish_reason is not None)

    def _observe_token(self, sample: Sample) -> None:
        now_s = time.monotonic()
        if self.served.metrics:
            if sample.last_token_s is None:
                self.served.metrics.observe_first_token(now_s - self.started_s)
            else:
                self.served.metrics.observe_between(now_s - sample.last_token_s)
        sample.last_token_s = now_s

    async def _end(self) -> None:
        """Settle, and wait until it is on the disk."""
        self._has_ended = True
        self._remember()
        await self.bill.close(self.counts)

    def _forget(self) -> None:
        """Settle a request that was cut off. Not awaited: it happens while the request is being cancelled."""
        self._has_ended = True
        self._remember()
        self.bill.close_later(self.counts)

    def _remember(self) -> None:
        for sample in self.samples:
            # Special tokens and cut characters make a text that its tokens do not spell; such answers are not kept.
            if self.served.tokenizer.decode(sample.reader.content_ids) == sample.content:
                self.served.answers.remember(sample.content, sample.reader.content_ids)
        if self.served.metrics:
            reasons = [sample.finish_reason or "abort" for sample in self.samples]
            elapsed_s = time.monotonic() - self.started_s
            self.served.metrics.observe_end(elapsed_s, reasons, self.counts.joules, float(self.cost_usd))


def usage_of(counts: Counts, cost_usd: Decimal) -> dict[str, Any]:
    """Token counts in OpenAI's and DeepSeek's fields, and what they cost in money and energy."""
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.output_tokens,
        "total_tokens": counts.prompt_tokens + counts.output_tokens,
        "prompt_cache_hit_tokens": counts.found_tokens,
        "prompt_cache_miss_tokens": counts.miss_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.found_tokens},
        "completion_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
        **extras_of(counts, cost_usd),
    }


def extras_of(counts: Counts, cost_usd: Decimal) -> dict[str, Any]:
    """What no other API's usage says."""
    return {"cost_usd": format(cost_usd, "f"), "joules": round(counts.joules, 3)}
