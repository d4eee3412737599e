"""The simple engine: continuous batching over one contiguous latent cache.

Requests wait until there is room, are prefilled together (each prompt once, however many samples are asked), and join
the running rows; every `step` draws one token for every row; finished rows leave the batch. Chat streams from it,
evaluation and reinforcement learning generate whole batches with it, and the paged engine is tested against it.

`step` is the only place where work happens, and everything between two steps is plain data, so callers may add and
cancel requests freely in between.
"""

import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.engine.packed_model import Draw
from shoal.engine.request import Completion, FinishReason, Request, TokenEvent
from shoal.engine.runner import Runner, runner_for
from shoal.engine.sampling import RowSampling, sample_seeds, sample_tokens
from shoal.errors import RequestError
from shoal.model.fp8_latent_cache import Fp8LatentCache
from shoal.model.latent_cache import LatentCache
from shoal.model.transformer import Transformer

PREFILL_TOKENS = 8192
"""Prompt tokens (padding included) computed in one pass."""

DEAD_FRACTION = 0.25
"""Finished rows are dropped from the cache once they are this share of it: dropping copies the rest."""

CACHE_GRAIN = 64
"""The cache grows in steps of this many positions."""


@dataclass
class _Rows:
    """The running batch: one entry per sample, everything a step needs as arrays."""

    sampling: RowSampling
    request_N: list[int]
    sample_N: list[int]
    stop_N: list[frozenset[int]]
    token_N: Tensor
    """Last drawn token, not yet in the cache."""
    position_N: Tensor
    """Where that token goes."""
    drawn_N: Tensor
    limit_N: Tensor
    alive_N: Tensor

    def keep(self, row_K: Tensor) -> "_Rows":
        picked = row_K.tolist()
        return _Rows(
            self.sampling.keep(row_K),
            [self.request_N[row] for row in picked],
            [self.sample_N[row] for row in picked],
            [self.stop_N[row] for row in picked],
            *(column[row_K] for column in self._columns()),
        )

    def join(self, other: "_Rows") -> "_Rows":
        columns = (torch.cat(pair) for pair in zip(self._columns(), other._columns()))
        return _Rows(
            RowSampling.join([self.sampling, other.sampling]),
            self.request_N + other.request_N,
            self.sample_N + other.sample_N,
            self.stop_N + other.stop_N,
            *columns,
        )

    def _columns(self) -> tuple[Tensor, ...]:
        return self.token_N, self.position_N, self.drawn_N, self.limit_N, self.alive_N


class Engine:
    """Generates for many requests at once.

    Args:
        model: in evaluation use; the engine never changes it, so a trainer may update it between calls.
        max_context: prompt and completion together; default and upper bound is the model's own.
        max_rows: samples running at once; further ones wait.
        runner: who computes the logits; default the fastest that fits the module.
        fp8_cache: keep latents in FP8 (a model with latent attention).
    """

    def __init__(
        self,
        model: Transformer,
        *,
        max_context: int | None = None,
        max_rows: int = 1024,
        runner: Runner | None = None,
        fp8_cache: bool = False,
    ) -> None:
        self.model = model
        self.runner = runner or runner_for(model)
        self._fp8_cache = fp8_cache
        self.max_context = min(
            max_context or model.config.max_position_embeddings, model.config.max_position_embeddings
        )
        self.max_rows = max_rows
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: _Rows | None = None
        self._cache: LatentCache | None = None
        self._next_id = 0
        self.tokens_of_step: dict[int, int] = {}
        """Tokens computed in the last step, by request."""

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return self._rows is None and not self._waiting

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one cached token takes over all layers, measured on a real cache."""
        return self._new_cache(1, 1).bytes_per_token

    def add(self, request: Request) -> int:
        """Queue a request; returns its id.

        Raises:
            RequestError: empty prompt, ids outside the vocabulary, or too long for the context.
        """
        prompt, sampling = request.prompt_ids, request.sampling
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token.")
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise RequestError(f"prompt ids must be in 0..{self.vocab_size - 1}; got {min(prompt)}..{max(prompt)}.")
        if len(prompt) + sampling.max_tokens > self.max_context:
            raise RequestError(
                f"prompt of {len(prompt)} tokens plus max_tokens={sampling.max_tokens} exceeds the context of "
                f"{self.max_context}; shorten the prompt or lower max_tokens to {max(self.max_context - len(prompt), 0)}."
            )
        if sampling.rules or sampling.constraint or sampling.top_logprobs:
            raise RequestError(
                "penalties, biases, forms and top_logprobs need the serving engine, which does not fit this model here "
                "(see shoal doctor); leave them out."
            )
        if sampling.num_samples > self.max_rows:
            raise RequestError(f"num_samples={sampling.num_samples} exceeds the {self.max_rows} rows of this engine.")
        self._next_id += 1
        self._waiting.append((self._next_id, request))
        return self._next_id

    def cancel(self, request_id: int) -> None:
        """Forget a request: its rows stop before the next step. Unknown or finished ids are fine."""
        self._waiting = deque(item for item in self._waiting if item[0] != request_id)
        if self._rows is not None:
            mine = torch.tensor([owner == request_id for owner in self._rows.request_N])
            self._rows.alive_N &= ~mine
            self._compact(fraction=0.0 if bool(mine.any()) else DEAD_FRACTION)

    @torch.no_grad()
    def step(self) -> list[TokenEvent]:
        """Admit what fits, then draw one token for every running row. Empty when idle."""
        self.tokens_of_step = {}
        events = self._admit()
        if self._rows is None or not bool(self._rows.alive_N.any()):
            self._compact(fraction=0.0)
            return events
        if not events:
            events = self._decode()
        return events

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Complete every request, in order; the inner list holds its samples."""
        ids = [self.add(request) for request in requests]
        done = {
            request_id: [
                Completion(token_ids=[], logprobs=[], finish_reason="length")
                for _ in range(request.sampling.num_samples)
            ]
            for request_id, request in zip(ids, requests)
        }
        while not self.is_idle:
            for event in self.step():
                if event.request_id not in done:
                    continue
                completion = done[event.request_id][event.sample]
                if event.token_id is not None:
                    completion.token_ids.append(event.token_id)
                    completion.logprobs.append(event.logprob)
                if event.finish_reason is not None:
                    completion.finish_reason = event.finish_reason
        return [done[request_id] for request_id in ids]

    def stream(self, request: Request) -> Iterator[TokenEvent]:
        """Events of one request as they come; closing the iterator cancels it."""
        request_id = self.add(request)
        left = request.sampling.num_samples
        try:
            while left:
                for event in self.step():
                    if event.request_id == request_id:
                        left -= event.finish_reason is not None
                        yield event
        finally:
            self.cancel(request_id)

    def _admit(self) -> list[TokenEvent]:
        """Prefill waiting requests while rows and one pass allow; their first tokens are the events."""
        running = 0 if self._rows is None else int(self._rows.alive_N.sum())
        group: list[tuple[int, Request]] = []
        longest = 0
        while self._waiting:
            _, request = self._waiting[0]
            longest = max(longest, len(request.prompt_ids))
            too_long = group and longest * (len(group) + 1) > PREFILL_TOKENS
            if too_long or running + request.sampling.num_samples > self.max_rows:
                break
            running += request.sampling.num_samples
            group.append(self._waiting.popleft())
        return self._prefill(group) if group else []

    def _new_cache(self, num_rows: int, num_positions: int) -> LatentCache:
        if self._fp8_cache:
            return Fp8LatentCache(self.model.config, num_rows, num_positions)
        return LatentCache(self.model.config, num_rows, num_positions, dtype=self.runner.cache_dtype)

    def _prefill(self, group: list[tuple[int, Request]]) -> list[TokenEvent]:
        """Compute the prompts of `group`, copy each cache row to its samples, draw their first tokens."""
        prompts = [request.prompt_ids for _, request in group]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        room = -(-(int(lengths.max()) + 1) // CACHE_GRAIN) * CACHE_GRAIN
        cache = self._new_cache(len(group), room)
        logit_BV = self.runner.prefill(prompts, cache)
        self.tokens_of_step = {request_id: len(request.prompt_ids) for request_id, request in group}
        source_N = torch.repeat_interleave(
            torch.arange(len(group)), torch.tensor([r.sampling.num_samples for _, r in group])
        )
        cache.keep_rows(source_N)
        rows = _new_rows(group, lengths[source_N])
        first = 0 if self._rows is None else len(self._rows.request_N)
        self._join(rows, cache)
        return self._draw(logit_BV[source_N], torch.arange(first, first + len(source_N)))

    def _join(self, rows: _Rows, cache: LatentCache) -> None:
        if self._rows is None or self._cache is None:
            self._rows, self._cache = rows, cache
        else:
            self._rows = self._rows.join(rows)
            self._cache.join(cache)

    def _decode(self) -> list[TokenEvent]:
        """One step of absorbed attention over the cache for every row; dead rows ride along until compaction."""
        assert self._rows is not None and self._cache is not None
        self._compact(fraction=DEAD_FRACTION)
        rows, cache = self._rows, self._cache
        needed = int(rows.position_N.max()) + 1
        if needed > cache.num_positions:
            cache.grow(-(-needed // CACHE_GRAIN) * CACHE_GRAIN)
        draw = Draw.of(rows.sampling.temperature_N, rows.sampling.uniform_numbers(rows.drawn_N))
        at_once = rows.sampling.is_plain and self.runner.decode_and_draw(rows.token_N, rows.position_N, cache, draw)
        logit_NV = None if at_once else self.runner.decode(rows.token_N, rows.position_N, cache)
        rows.position_N += rows.alive_N
        for request_id in rows.request_N:
            self.tokens_of_step[request_id] = self.tokens_of_step.get(request_id, 0) + 1
        row_N = rows.alive_N.nonzero().squeeze(1)
        if logit_NV is not None:
            return self._draw(logit_NV if len(row_N) == len(logit_NV) else logit_NV[row_N], row_N)
        return self._take(row_N, draw.token_N[row_N], draw.logprob_N[row_N], torch.ones(len(row_N), dtype=torch.bool))

    def _draw(self, logit_NV: Tensor, row_N: Tensor) -> list[TokenEvent]:
        """Draw for the rows `row_N` from a line of logits each."""
        assert self._rows is not None
        rows = self._rows
        return self._take(row_N, *sample_tokens(logit_NV, rows.sampling.keep(row_N), rows.drawn_N[row_N]))

    def _take(self, row_N: Tensor, token_N: Tensor, logprob_N: Tensor, finite_N: Tensor) -> list[TokenEvent]:
        """Append what was drawn for the rows `row_N`."""
        assert self._rows is not None
        rows = self._rows
        rows.token_N[row_N] = token_N
        rows.drawn_N[row_N] += 1
        full_N = rows.drawn_N[row_N] >= rows.limit_N[row_N]
        events = []
        for row, token, logprob, finite, full in zip(
            row_N.tolist(), token_N.tolist(), logprob_N.tolist(), finite_N.tolist(), full_N.tolist()
        ):
            reason: FinishReason | None = "stop" if token in rows.stop_N[row] else "length" if full else None
            if not finite:
                token, reason = None, "error"
            if reason is not None:
                rows.alive_N[row] = False
            events.append(
                TokenEvent(
                    request_id=rows.request_N[row],
                    sample=rows.sample_N[row],
                    token_id=token,
                    logprob=logprob,
                    finish_reason=reason,
                )
            )
        return events

    def _compact(self, fraction: float) -> None:
        """Drop dead rows when they are more than `fraction` of the batch."""
        if self._rows is None or self._cache is None:
            return
        alive_K = self._rows.alive_N.nonzero().squeeze(1)
        dead = len(self._rows.alive_N) - len(alive_K)
        if len(alive_K) == 0:
            self._rows = self._cache = None
        elif dead > fraction * len(self._rows.alive_N):
            self._rows = self._rows.keep(alive_K)
            self._cache.keep_rows(alive_K)


def _new_rows(group: list[tuple[int, Request]], length_N: Tensor) -> _Rows:
    """Rows of freshly prefilled requests; `position_N` is where their first drawn token will go."""
    asked = [
        (request_id, sample, request.sampling)
        for request_id, request in group
        for sample in range(request.sampling.num_samples)
    ]
    seeds = [sample_seeds(_seed_of(request), request.sampling.num_samples) for _, request in group]
    sampling = RowSampling(
        temperature_N=torch.tensor([params.temperature for _, _, params in asked]),
        top_p_N=torch.tensor([params.top_p for _, _, params in asked]),
        top_k_N=torch.tensor([params.top_k for _, _, params in asked]),
        seed_N=np.concatenate(seeds),
    )
    return _Rows(
        sampling=sampling,
        request_N=[request_id for request_id, _, _ in asked],
        sample_N=[sample for _, sample, _ in asked],
        stop_N=[frozenset(params.stop_token_ids) for _, _, params in asked],
        token_N=torch.zeros(len(asked), dtype=torch.long),
        position_N=length_N.clone(),
        drawn_N=torch.zeros(len(asked), dtype=torch.long),
        limit_N=torch.tensor([params.max_tokens for _, _, params in asked]),
        alive_N=torch.ones(len(asked), dtype=torch.bool),
    )


def _seed_of(request: Request) -> int:
    return secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
