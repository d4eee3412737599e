"""The serving engine: paged latents, prompts in chunks beside running decodes, prefixes found in RAM and on disk.

Same interface and same tokens as the simple engine (`engine.py`), which stays its reference. Every step is one pass of
the packed model over a mixed batch that the scheduler planned. The bits of a row depend on nothing but its own text
(`kernels/cpu/forward.cpp`), so a cache hit, another chunking, a preemption or other neighbours change nobody's answer.

    plan      who computes which tokens, pages provided                     scheduler.py, pages.py
    run       one pass over all of them                                     packed_model.py
    draw      a token for whoever reached its end, more where guesses fit   drawing.py
    guess     what comes after, where that pays                             speculative.py
    offer     units that became full, to RAM and disk                       context_cache.py
"""

import secrets
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoal.engine.batch import Batch
from shoal.engine.context_cache import ContextCache
from shoal.engine.disk_cache import DiskCache, DiskStats
from shoal.engine.drawing import Sample, draw, take
from shoal.engine.packed_model import PackedModel, cache_width
from shoal.engine.pages import PagePool
from shoal.engine.prefix_cache import UNIT_TOKENS, CacheIdentity, PrefixCache
from shoal.engine.request import Request, TokenEvent
from shoal.engine.sampling import sample_seeds
from shoal.engine.scheduler import Found, Scheduler, Sequence, Work
from shoal.engine.speculation_gauge import Way
from shoal.engine.speculative import Speculation
from shoal.errors import RequestError
from shoal.kernels.huge_pages import WeightMemory


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """Sizes of the engine."""

    cache_bytes: int = 1 << 30
    """RAM of the latent pool."""
    fp8_cache: bool = False
    """Keep latents in FP8: 656 bytes a token and layer at V3's widths in the place of 1152."""
    max_context: int | None = None
    """Prompt and completion together; default and upper bound: the model's positions."""
    max_running: int = 64
    step_tokens: int = 512
    """Tokens of one pass: a prompt is read in chunks of what the decodes leave of them."""


@dataclass(frozen=True, kw_only=True)
class ServingStats:
    """Counters since the start, and what is held now."""

    running: int
    waiting: int
    preemptions: int
    pages_total: int
    pages_free: int
    pages_idle: int
    """Held by the prefix cache alone."""
    pages_in_use: int
    prompt_tokens: int
    found_tokens: int
    generated_tokens: int
    corrupted: int
    """Samples that ended because their scores were not finite or their form broke."""
    spoilt_units: int
    steps: int
    drafted: tuple[int, ...]
    """Guesses checked, by place after the drawn token; empty without speculation."""
    accepted: tuple[int, ...]
    disk: DiskStats | None


class ServingEngine:
    """Generates for many requests at once over one pool of pages.

    Args:
        identity: of the weights and everything else that decides latents; None keeps no cache between requests.
        speculation: guesses tokens ahead; its latents are one more layer of every unit.
    """

    def __init__(
        self,
        model: PackedModel,
        config: ServingConfig | None = None,
        *,
        identity: CacheIdentity | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.model, self.config = model, config or ServingConfig()
        self.speculation = speculation
        shape = model.config
        self.max_context = min(self.config.max_context or shape.max_position_embeddings, shape.max_position_embeddings)
        pool_LPTW = _empty_pool(model, shape.num_hidden_layers + (speculation is not None), self.config)
        # The prediction module's latents are the last layer.
        self._main_LPTW = pool_LPTW[: shape.num_hidden_layers]
        self._ahead_1PTW = pool_LPTW[shape.num_hidden_layers :]
        self.pool = PagePool(pool_LPTW.shape[1])
        self.prefix = PrefixCache(self.pool)
        self.cache = ContextCache(self.prefix, pool_LPTW, shape.kv_lora_rank)
        self.identity = identity or CacheIdentity.unique()
        self.scheduler = Scheduler(
            self.pool,
            self.prefix,
            max_running=self.config.max_running,
            step_tokens=self.config.step_tokens,
            lookup=self._look_up,
        )
        self._samples: dict[int, list[Sample]] = {}
        self._next_id = 0
        self.tokens_of_step: dict[int, int] = {}
        """Tokens computed in the last step, by request."""
        self._prompt_tokens = self._found_tokens = self._generated = self._corrupted = self._steps = 0

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def unit_bytes(self) -> int:
        """Of 64 positions of every layer."""
        return self.cache.unit_bytes

    @property
    def disk(self) -> DiskCache | None:
        """Where units outlive the process."""
        return self.cache.disk

    @disk.setter
    def disk(self, disk: DiskCache | None) -> None:
        self.cache.disk = disk

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return self.scheduler.is_idle

    @property
    def stats(self) -> ServingStats:
        """Counters for the metrics page."""
        gauge = self.speculation.gauge if self.speculation else None
        return ServingStats(
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            preemptions=self.scheduler.preemptions,
            pages_total=self.pool.num_pages,
            pages_free=self.pool.num_free,
            pages_idle=self.pool.num_idle,
            pages_in_use=self.pool.num_in_use,
            prompt_tokens=self._prompt_tokens,
            found_tokens=self._found_tokens,
            generated_tokens=self._generated,
            corrupted=self._corrupted,
            spoilt_units=self.cache.spoilt,
            steps=self._steps,
            drafted=tuple(gauge.drafted) if gauge else (),
            accepted=tuple(gauge.accepted) if gauge else (),
            disk=replace(self.disk.stats) if self.disk else None,
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
        root = replace(self.identity, isolation=request.isolation).root
        samples = [
            Sample(
                request_id=self._next_id,
                sample=index,
                token_ids=list(request.prompt_ids),
                prompt_tokens=len(request.prompt_ids),
                tenant=request.tenant,
                priority=request.priority,
                cache_root=root,
                request=request,
                seed=row_seed,
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
        started_s = time.perf_counter()
        way = self._way()
        planned = self.scheduler.plan(with_drafts=way == "guess")
        self.tokens_of_step = {}
        for work in planned:
            request_id = work.sequence.request_id
            self.tokens_of_step[request_id] = self.tokens_of_step.get(request_id, 0) + work.count
        if not planned:
            return []
        self._steps += 1
        batch = Batch.of(planned)
        hidden_MD = None if way == "off" else torch.empty(len(batch.token_M), self.model.config.hidden_size)
        events = self._draw(planned, self._run(planned, batch, hidden_MD))
        self._guess(planned, batch, hidden_MD, way, len(events), started_s)
        for work in planned:
            self.cache.offer(work.sequence)
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

    def _way(self) -> Way:
        if self.speculation is None:
            return "off"
        return self.speculation.gauge.way(max(self.scheduler.num_decoding, 1))

    def _run(self, planned: Many[Work], batch: Batch, hidden_MD: Tensor | None) -> Tensor:
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
            self._main_LPTW,
            output_row=torch.tensor(last, dtype=torch.int32),
            table_BX=batch.table_BX,
            hidden_out=hidden_MD,
        )

    def _draw(self, planned: Many[Work], logit_NV: Tensor) -> list[TokenEvent]:
        """A token for every work that draws, and another one after every guess that was right."""
        events: list[TokenEvent] = []
        accepted = [0] * len(planned)
        going: list[tuple[int, int]] = []
        line = 0
        for index, work in enumerate(planned):
            if work.draws:
                going.append((index, line))
                line += 1 + len(work.draft)
        while going:
            samples = [_sample(planned[index]) for index, _ in going]
            lines_NV = logit_NV if len(going) == len(logit_NV) else logit_NV[[line for _, line in going]]
            still = []
            for (index, line), sample, drawn in zip(going, samples, draw(samples, lines_NV)):
                events.append(event := take(sample, drawn))
                self._count(sample, event)
                draft = planned[index].draft[accepted[index] :]
                if draft and event.finish_reason is None and event.token_id == draft[0]:
                    accepted[index] += 1
                    still.append((index, line + 1))
            going = still
        for work, right in zip(planned, accepted):
            self.scheduler.done(work, right)
            if work.draft and self.speculation:
                self.speculation.gauge.count(len(work.draft), right)
        return events

    def _guess(
        self,
        planned: Many[Work],
        batch: Batch,
        hidden_MD: Tensor | None,
        way: Way,
        num_events: int,
        started_s: float,
    ) -> None:
        """Guess for the next step, and tell the gauge how this one went."""
        if self.speculation is None or hidden_MD is None:
            return
        drawn_s = time.perf_counter()
        self.speculation.guess(planned, batch, hidden_MD, self._ahead_1PTW)
        ended_s = time.perf_counter()
        # Texts whose beginning the module has not read are not guessed on: a step of theirs says nothing about guessing.
        counts = way == "plain" or 2 * sum(bool(work.draft) for work in planned) >= len(planned)
        if counts and all(work.draws and work.count == 1 for work in planned):
            self.speculation.gauge.note(
                way,
                sequences=len(planned),
                tokens=num_events,
                seconds=ended_s - started_s,
                drafting_s=ended_s - drawn_s,
            )

    def _count(self, sample: Sample, event: TokenEvent) -> None:
        """Keep the counters, and let a sample's siblings start when its prompt has been read."""
        self._generated += event.token_id is not None
        self._corrupted += event.finish_reason == "error"
        for sibling in reversed(sample.siblings):
            self.scheduler.add(sibling, first=True)
        sample.siblings = []
        if sample.sample == 0 and sample.drawn == 1:
            self._found_tokens += sample.found_tokens

    def _end(self, event: TokenEvent) -> None:
        mine = self._samples.get(event.request_id, [])
        for sample in [each for each in mine if each.sample == event.sample]:
            self.scheduler.remove(sample)
            mine.remove(sample)
        if not mine:
            self._samples.pop(event.request_id, None)

    def _look_up(self, sequence: Sequence) -> Found:
        """What the caches have of a sequence; found units count as complete for the prediction module too."""
        have = len(sequence.pages) * UNIT_TOKENS
        found = self.cache.look_up(sequence)
        assert isinstance(sequence, Sample)
        if sequence.ahead >= have:
            sequence.ahead = have + len(found.pages) * UNIT_TOKENS
        return found


def _empty_pool(model: PackedModel, num_layers: int, config: ServingConfig) -> Tensor:
    """Pages for so many bytes, `[layers, pages, 64, latent + rotary or bytes of an entry]`, two at least."""
    dtype = torch.uint8 if config.fp8_cache else model.float_dtype
    width = cache_width(model.config, config.fp8_cache)
    num_pages = max(config.cache_bytes // (num_layers * UNIT_TOKENS * width * dtype.itemsize), 2)
    return WeightMemory().empty((num_layers, num_pages, UNIT_TOKENS, width), dtype)


def _sample(work: Work) -> Sample:
    assert isinstance(work.sequence, Sample)
    return work.sequence
