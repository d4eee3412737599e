"""The serving engine: paged latents, prompts in chunks beside running decodes, prefixes found in RAM and on disk.

Same interface and same tokens as the simple engine (`engine.py`), which stays its reference. Every step is one pass of
the packed model over a mixed batch that the scheduler planned. The bits of a row depend on nothing but its own text
(`kernels/cpu/forward.cpp`), so a cache hit, another chunking, a preemption or other neighbours change nobody's answer.

Latents live in units of 64 positions of all layers. A full unit is offered to the prefix cache under a key that chains
over the model's identity and all tokens up to its end, and is written to disk behind the answer's back.
"""

import secrets
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from shoal.engine.disk_cache import DiskCache
from shoal.engine.logit_rules import Constraint, apply_rules, top_logprobs
from shoal.engine.packed_model import PackedModel
from shoal.engine.pages import PagePool
from shoal.engine.prefix_cache import UNIT_TOKENS, CacheIdentity, PrefixCache, unit_key
from shoal.engine.request import FinishReason, Request, TokenEvent
from shoal.engine.sampling import RowSampling, sample_seeds, sample_tokens
from shoal.engine.scheduler import Found, Scheduler, Sequence, Work
from shoal.engine.speculative import Drafter, SpeculationGauge
from shoal.errors import RequestError

LOAD_BYTES = 64 << 20
"""Read from disk per step at most, so that a long cached prompt does not hold up its neighbours."""


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """Sizes of the engine."""

    cache_bytes: int = 1 << 30
    """RAM of the latent pool."""
    max_context: int | None = None
    """Prompt and completion together; default and upper bound: the model's positions."""
    max_running: int = 64
    step_tokens: int = 512
    """Tokens of one pass: a prompt is read in chunks of what the decodes leave of them."""


@dataclass(eq=False, kw_only=True)
class _Sample(Sequence):
    """A sequence with what drawing needs."""

    request: Request
    seed: np.uint64
    identity: CacheIdentity
    stop: frozenset[int]
    constraint: Constraint | None = None
    siblings: list["_Sample"] = field(default_factory=list)
    """Other samples of the same prompt; they start when it has been read, and find it in the cache."""

    @property
    def drawn(self) -> int:
        return len(self.token_ids) - self.prompt_tokens


@dataclass(frozen=True)
class _Batch:
    """The tokens of one pass as arrays, and where each work's rows begin."""

    token_M: Tensor
    position_M: Tensor
    sequence_M: Tensor
    table_BX: Tensor
    first_row: list[int]


@dataclass(frozen=True)
class _Drawn:
    """A token drawn for a sample."""

    token: int
    logprob: float
    is_fine: bool
    likely: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class ServingStats:
    """Counters since the start, and what is held now."""

    running: int
    waiting: int
    preemptions: int
    pages_total: int
    pages_free: int
    prompt_tokens: int
    found_tokens: int
    generated_tokens: int
    steps: int
    drafted: int
    accepted: int


class ServingEngine:
    """Generates for many requests at once over one pool of pages.

    Args:
        identity: of the weights and everything else that decides latents; None keeps no cache between requests.
        disk: where units outlive the process.
        drafter: guesses tokens ahead, see `speculative.py`; its latents are one more layer of every unit.
    """

    def __init__(
        self,
        model: PackedModel,
        config: ServingConfig | None = None,
        *,
        identity: CacheIdentity | None = None,
        disk: DiskCache | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.drafter, self.gauge = drafter, SpeculationGauge()
        self.model, self.config = model, config or ServingConfig()
        shape = model.config
        self.max_context = min(self.config.max_context or shape.max_position_embeddings, shape.max_position_embeddings)
        dtype = torch.float32 if model.format == "f32" else torch.bfloat16
        unit_shape = (shape.num_hidden_layers + (drafter is not None), UNIT_TOKENS, shape.cache_width)
        self.unit_bytes = int(np.prod(unit_shape)) * dtype.itemsize
        num_pages = max(self.config.cache_bytes // self.unit_bytes, 2)
        self.pool_LPTW = torch.zeros(unit_shape[0], num_pages, *unit_shape[1:], dtype=dtype)
        self.pool = PagePool(num_pages)
        self.prefix = PrefixCache(self.pool)
        self.disk = disk
        self.identity = identity or CacheIdentity.unique()
        self.scheduler = Scheduler(
            self.pool,
            self.prefix,
            max_running=self.config.max_running,
            step_tokens=self.config.step_tokens,
            lookup=self._look_up,
        )
        self._samples: dict[int, list[_Sample]] = {}
        self._next_id = 0
        self.tokens_of_step: dict[int, int] = {}
        """Tokens computed in the last step, by request."""
        self._unit = torch.empty(unit_shape, dtype=dtype)
        self._prompt_tokens = self._found_tokens = self._generated = self._steps = 0

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return self.scheduler.is_idle

    @property
    def stats(self) -> ServingStats:
        """Counters for the metrics page."""
        return ServingStats(
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            preemptions=self.scheduler.preemptions,
            pages_total=self.pool.num_pages,
            pages_free=self.pool.num_free,
            prompt_tokens=self._prompt_tokens,
            found_tokens=self._found_tokens,
            generated_tokens=self._generated,
            steps=self._steps,
            drafted=self.gauge.drafted,
            accepted=self.gauge.accepted,
        )

    def add(self, request: Request) -> int:
        """Queue a request; returns its id.

        Raises:
            RequestError: empty prompt, ids outside the vocabulary, or too long for the context or the pool.
        """
        self._check(request)
        self._next_id += 1
        params = request.sampling
        seed = secrets.randbits(63) if params.seed is None else params.seed
        samples = [
            _Sample(
                request_id=self._next_id,
                sample=index,
                token_ids=list(request.prompt_ids),
                prompt_tokens=len(request.prompt_ids),
                tenant=request.tenant,
                priority=request.priority,
                request=request,
                seed=row_seed,
                identity=replace(self.identity, isolation=request.isolation),
                stop=frozenset(params.stop_token_ids),
                constraint=params.constraint() if params.constraint else None,
            )
            for index, row_seed in enumerate(sample_seeds(seed, params.num_samples))
        ]
        samples[0].siblings = samples[1:]
        self._samples[self._next_id] = samples
        self._prompt_tokens += len(request.prompt_ids)
        self.scheduler.add(samples[0])
        return self._next_id

    def cancel(self, request_id: int) -> None:
        """Forget a request and free its pages. Unknown or finished ids are fine."""
        for sample in self._samples.pop(request_id, []):
            self.scheduler.remove(sample)

    @torch.no_grad()
    def step(self) -> list[TokenEvent]:
        """One pass over whatever the scheduler planned; the tokens drawn after it. Empty when idle."""
        planned = self.scheduler.plan()
        self.tokens_of_step = {}
        for work in planned:
            request_id = work.sequence.request_id
            self.tokens_of_step[request_id] = self.tokens_of_step.get(request_id, 0) + work.count
        if not planned:
            return []
        started_s = time.perf_counter()
        self._steps += 1
        batch = self._batch(planned)
        drafts = self.drafter is not None and self.gauge.wants_drafts()
        hidden_MD = torch.empty(len(batch.token_M), self.model.config.hidden_size) if drafts else None
        logit_NV = self._run(planned, batch, hidden_MD)
        events, accepted = self._draw(planned, logit_NV)
        for work in planned:
            self.scheduler.done(work, accepted.get(work.sequence.request_id, {}).get(work.sequence.sample, 0))
        if hidden_MD is not None:
            self._draft(planned, batch, hidden_MD)
        for work in planned:
            self._offer_units(work.sequence)
        if self.drafter is not None and all(work.draws and work.count == 1 for work in planned):
            self.gauge.note(
                with_drafts=drafts,
                seconds=time.perf_counter() - started_s,
                tokens=len(events),
                drafted=sum(len(work.draft) for work in planned),
                accepted=sum(sum(by_sample.values()) for by_sample in accepted.values()),
            )
        for event in events:
            if event.finish_reason is not None:
                self._end(event)
        return events

    def _check(self, request: Request) -> None:
        prompt, wanted = request.prompt_ids, request.sampling.max_tokens
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token.")
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise RequestError(f"prompt ids must be in 0..{self.vocab_size - 1}; got {min(prompt)}..{max(prompt)}.")
        room = min(self.max_context, self.pool.num_pages * UNIT_TOKENS)
        if request.sampling.rules:
            request.sampling.rules.check(self.vocab_size)
        if len(prompt) + wanted > room:
            raise RequestError(
                f"prompt of {len(prompt)} tokens plus max_tokens={wanted} exceeds the context of {room}; shorten the "
                f"prompt or lower max_tokens to {max(room - len(prompt), 0)}."
            )

    def _batch(self, planned: Many[Work]) -> _Batch:
        token: list[int] = []
        position: list[int] = []
        row: list[int] = []
        first_row: list[int] = []
        table_BX = np.zeros((len(planned), max(len(work.sequence.pages) for work in planned)), dtype=np.int32)
        for index, work in enumerate(planned):
            first_row.append(len(token))
            token += [*work.sequence.token_ids[work.start : work.start + work.count], *work.draft]
            position += range(work.start, work.start + work.rows)
            row += [index] * work.rows
            table_BX[index, : len(work.sequence.pages)] = work.sequence.pages
        return _Batch(
            torch.tensor(token),
            torch.tensor(position, dtype=torch.int32),
            torch.tensor(row, dtype=torch.int32),
            torch.from_numpy(table_BX),
            first_row,
        )

    def _run(self, planned: Many[Work], batch: _Batch, hidden_MD: Tensor | None) -> Tensor:
        """Logits of the works that draw: after their last token, and after each guess."""
        last = [
            first + work.count - 1 + guess
            for first, work in zip(batch.first_row, planned)
            if work.draws
            for guess in range(1 + len(work.draft))
        ]
        return self.model.run(
            batch.token_M,
            batch.position_M,
            batch.sequence_M,
            self.pool_LPTW[: self.model.config.num_hidden_layers],
            output_row=torch.tensor(last, dtype=torch.int32),
            table_BX=batch.table_BX,
            hidden_out=hidden_MD,
        )

    def _draw(self, planned: Many[Work], logit_NV: Tensor) -> tuple[list[TokenEvent], dict[int, dict[int, int]]]:
        """A token for every work that draws, and another one for every guess that was right; the guesses accepted by request
        and sample."""
        events: list[TokenEvent] = []
        accepted: dict[int, dict[int, int]] = {}
        going: list[tuple[_Sample, tuple[int, ...], int]] = []
        line = 0
        for work in planned:
            if work.draws:
                assert isinstance(work.sequence, _Sample)
                going.append((work.sequence, work.draft, line))
                line += 1 + len(work.draft)
        while going:
            lines = torch.tensor([line for _, _, line in going])
            drawn = self._draw_lines([sample for sample, _, _ in going], logit_NV[lines])
            still = []
            for (sample, draft, line), each in zip(going, drawn):
                event = self._event(sample, each)
                events.append(event)
                if draft and event.finish_reason is None and event.token_id == draft[0]:
                    by_sample = accepted.setdefault(sample.request_id, {})
                    by_sample[sample.sample] = by_sample.get(sample.sample, 0) + 1
                    still.append((sample, draft[1:], line + 1))
            going = still
        return events, accepted

    def _draw_lines(self, samples: list[_Sample], logit_NV: Tensor) -> list[_Drawn]:
        """One token for each sample from its line of logits."""
        params = [sample.request.sampling for sample in samples]
        top: list[list[tuple[int, float]]] = [[] for _ in samples]
        if any(each.top_logprobs for each in params):
            top = top_logprobs(logit_NV, max(each.top_logprobs for each in params))
        failed = self._apply_rules(samples, logit_NV)
        rows = RowSampling(
            temperature_N=torch.tensor([each.temperature for each in params]),
            top_p_N=torch.tensor([each.top_p for each in params]),
            top_k_N=torch.tensor([each.top_k for each in params]),
            seed_N=np.array([sample.seed for sample in samples], dtype=np.uint64),
        )
        drawn_N = torch.tensor([sample.drawn for sample in samples])
        token_N, logprob_N, finite_N = (column.tolist() for column in sample_tokens(logit_NV, rows, drawn_N))
        return [
            _Drawn(token, logprob, finite and sample not in failed, likely[: each.top_logprobs])
            for sample, token, logprob, finite, likely, each in zip(samples, token_N, logprob_N, finite_N, top, params)
        ]

    def _draft(self, planned: Many[Work], batch: _Batch, hidden_MD: Tensor) -> None:
        """Guess on for everybody who goes on decoding, and keep the drafter's latents of all rows whose next token is known."""
        assert self.drafter is not None
        rows: list[int] = []
        following: list[int] = []
        guessing: list[_Sample] = []
        last: list[int] = []
        for first, work in zip(batch.first_row, planned):
            sample = work.sequence
            assert isinstance(sample, _Sample)
            count = min(sample.computed, len(sample.token_ids) - 1) - work.start
            rows += range(first, first + count)
            following += sample.token_ids[work.start + 1 : work.start + 1 + count]
            sample.draft = []
            if count and work.draws and self._may_guess(sample):
                guessing.append(sample)
                last.append(len(rows) - 1)
        if not rows:
            return
        picked = torch.tensor(rows)
        guess_N = self.drafter.draft(
            hidden_MD[picked],
            torch.tensor(following),
            batch.position_M[picked],
            batch.sequence_M[picked],
            self.pool_LPTW[self.model.config.num_hidden_layers :],
            output_row=torch.tensor(last, dtype=torch.int32),
            table_BX=batch.table_BX,
        )
        for sample, guess in zip(guessing, guess_N.tolist()):
            sample.draft = [guess]

    def _may_guess(self, sample: _Sample) -> bool:
        """Whether a second token could be drawn next; rules look at every token before the next, so they decode plainly."""
        params = sample.request.sampling
        plain = params.rules is None and sample.constraint is None
        return plain and sample.drawn + 1 < params.max_tokens and sample.token_ids[-1] not in sample.stop

    def _apply_rules(self, samples: list[_Sample], logit_NV: Tensor) -> list[_Sample]:
        """Apply rules and forms to the rows that have any, in place; returns the samples whose form broke."""
        failed = []
        for row, sample in enumerate(samples):
            rules = sample.request.sampling.rules
            if rules is None and sample.constraint is None:
                continue
            try:
                logit_NV[row] = apply_rules(
                    logit_NV[row],
                    rules,
                    sample.constraint,
                    prompt_ids=sample.token_ids[: sample.prompt_tokens],
                    generated_ids=sample.token_ids[sample.prompt_tokens :],
                    stop_ids=sample.stop,
                    temperature=sample.request.sampling.temperature,
                )
            except RequestError:
                failed.append(sample)
        return failed

    def _event(self, sample: _Sample, drawn: _Drawn) -> TokenEvent:
        if drawn.is_fine:
            sample.token_ids.append(drawn.token)
            self._generated += 1
            if sample.constraint is not None:
                sample.constraint.advance(drawn.token)
        full = sample.drawn >= sample.request.sampling.max_tokens
        reason: FinishReason | None = "stop" if drawn.token in sample.stop else "length" if full else None
        if sample.siblings:
            for sibling in reversed(sample.siblings):
                self.scheduler.add(sibling, first=True)
            sample.siblings = []
        if sample.sample == 0 and sample.drawn == 1:
            self._found_tokens += sample.found_tokens
        return TokenEvent(
            request_id=sample.request_id,
            sample=sample.sample,
            token_id=drawn.token if drawn.is_fine else None,
            logprob=drawn.logprob,
            finish_reason=reason if drawn.is_fine else "error",
            top=tuple(drawn.likely),
            found_tokens=sample.found_tokens,
        )

    def _end(self, event: TokenEvent) -> None:
        mine = self._samples.get(event.request_id, [])
        for sample in [each for each in mine if each.sample == event.sample]:
            self.scheduler.remove(sample)
            mine.remove(sample)
        if not mine:
            self._samples.pop(event.request_id, None)

    def _keys_up_to(self, sample: _Sample, num_units: int) -> list[bytes]:
        """Keys of the first full units, each made once."""
        keys = sample.unit_keys
        while len(keys) < num_units:
            unit = sample.token_ids[len(keys) * UNIT_TOKENS : (len(keys) + 1) * UNIT_TOKENS]
            keys.append(unit_key(keys[-1] if keys else sample.identity.root, unit))
        return keys[:num_units]

    def _look_up(self, sequence: Sequence) -> Found:
        """The sequence's next units out of RAM, then from disk; its last token is always computed anew."""
        assert isinstance(sequence, _Sample)
        have = len(sequence.pages)
        keys = self._keys_up_to(sequence, (len(sequence.token_ids) - 1) // UNIT_TOKENS)
        pages = self.prefix.match(keys[have:])
        if self.disk is None:
            return Found(pages)
        room = max(LOAD_BYTES // self.unit_bytes, 1)
        for index in range(have + len(pages), len(keys)):
            if room == 0:
                return Found(pages, is_more=True)
            page = self._load(keys[index], keys[index - 1] if index else None)
            if page is None:
                break
            pages.append(page)
            room -= 1
        return Found(pages)

    def _load(self, key: bytes, parent: bytes | None) -> int | None:
        """A page filled from disk and known to the prefix cache; None when disk has not got it or RAM no room."""
        assert self.disk is not None
        if not self.disk.get_into(key, memoryview(self._unit.view(torch.uint8).numpy().data).cast("B")):
            return None
        if self.pool.num_free == 0:
            self.prefix.evict(1)
        if self.pool.num_free == 0:
            return None
        (page,) = self.pool.allocate(1)
        self.pool_LPTW[:, page] = self._unit
        self.prefix.insert([key], [page], parent=parent)
        return page

    def _offer_units(self, sequence: Sequence) -> None:
        """Make the units that became full known to RAM and disk."""
        assert isinstance(sequence, _Sample)
        full = sequence.computed // UNIT_TOKENS
        first = sequence.cached_units
        if full <= first:
            return
        known = self._keys_up_to(sequence, full)
        keys, pages = known[first:], sequence.pages[first:full]
        self.prefix.insert(keys, pages, parent=known[first - 1] if first else None)
        sequence.cached_units = full
        if self.disk is not None:
            for key, page in zip(keys, pages):
                self.disk.put(key, self.pool_LPTW[:, page].contiguous().view(torch.uint8).numpy().tobytes())
