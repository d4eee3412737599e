"""Pages, prefix cache and scheduler under random histories: nothing leaks, nothing is shared wrongly, everybody ends."""

import dataclasses
import zlib

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.engine.context_cache import ContextCache
from shoal.engine.pages import PagePool
from shoal.engine.prefix_cache import UNIT_TOKENS, CacheIdentity, PrefixCache
from shoal.engine.scheduler import Found, Scheduler, Sequence

IDENTITY = CacheIdentity(weights_digest="w", dtype="bf16", layout_version=1, rope_digest="r", tokenizer_digest="t")


PAGES, STEP_TOKENS = 9, 100


class Serving(RuleBasedStateMachine):
    """The real scheduler, pages, prefix cache and context cache, with a model whose latents are digests of the text.

    A page's content is checked wherever somebody reads it, so that a page shared wrongly, written while shared, freed too
    early or found under a wrong key shows as a wrong digest.
    """

    def __init__(self):
        super().__init__()
        self.start()
        self.alive = []
        self.count = 0

    def start(self):
        self.pool = PagePool(PAGES)
        self.cache = PrefixCache(self.pool)
        self.latents = torch.zeros(1, PAGES, UNIT_TOKENS, 1, dtype=torch.int64)
        self.context = ContextCache(self.cache, self.latents, 1)
        self.scheduler = Scheduler(
            self.pool, self.cache, max_running=4, step_tokens=STEP_TOKENS, lookup=self.context.look_up
        )

    @rule(
        length=st.integers(1, 400),
        token=st.integers(0, 1),
        priority=st.integers(0, 1),
        tenant=st.sampled_from("ab"),
        isolation=st.sampled_from("xy"),
        more=st.integers(1, 100),
    )
    def add(self, length, token, priority, tenant, isolation, more):
        self.count += 1
        sequence = Sequence(
            request_id=self.count,
            sample=more,
            token_ids=[token] * length,
            prompt_tokens=length,
            tenant=tenant,
            priority=priority,
            cache_root=dataclasses.replace(IDENTITY, isolation=isolation).root,
        )
        self.alive.append(sequence)
        self.scheduler.add(sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data):
        sequence = data.draw(st.sampled_from(self.alive))
        self.alive.remove(sequence)
        self.scheduler.remove(sequence)
        assert sequence.pages == []

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), count=st.integers(1, 3))
    def guess(self, data, count):
        data.draw(st.sampled_from(self.alive)).draft = [3] * count

    @rule(times=st.integers(1, 20), accepted=st.integers(0, 3))
    def steps(self, times, accepted):
        for _ in range(times):
            self.step(accepted)

    def step(self, accepted=0):
        planned = self.scheduler.plan()
        assert sum(work.rows for work in planned) <= STEP_TOKENS
        assert len({id(work.sequence) for work in planned}) == len(planned)
        for work in planned:
            sequence = work.sequence
            assert work.start == sequence.computed
            assert len(sequence.pages) * UNIT_TOKENS >= work.start + work.rows
            self.check_read(sequence)
            tokens = [*sequence.token_ids[: work.start + work.count], *work.draft]
            for place, latent in list(enumerate(latents_of(sequence, tokens)))[work.start :]:
                page = sequence.pages[place // UNIT_TOKENS]
                assert self.pool.holders(page) == 1, "a shared page is written"
                self.latents[0, page, place % UNIT_TOKENS, 0] = latent
            right = min(accepted, len(work.draft))
            if work.draws:
                sequence.token_ids += [*work.draft[:right], 2]
            self.scheduler.done(work, right)
            self.context.offer(sequence)
            if len(sequence.token_ids) >= min(sequence.prompt_tokens + sequence.sample, PAGES * UNIT_TOKENS - 4):
                self.alive.remove(sequence)
                self.scheduler.remove(sequence)
        return planned

    def check_read(self, sequence):
        """What the sequence believes to be computed is what the pages hold."""
        held = self.latents[0, sequence.pages].flatten()[: sequence.computed].tolist()
        assert held == latents_of(sequence, sequence.token_ids[: sequence.computed])

    @invariant()
    def pages_add_up(self):
        held = {page for sequence in self.alive for page in sequence.pages}
        cached = {unit.page for unit in self.cache._units.values()}
        assert self.pool.num_free + len(held | cached) == self.pool.num_pages
        assert self.pool.num_in_use == len(held)
        assert self.pool.num_idle == len(cached - held)
        for page in range(self.pool.num_pages):
            holders = sum(sequence.pages.count(page) for sequence in self.alive) + (page in cached)
            assert self.pool.holders(page) == holders

    def teardown(self):
        for _ in range(3000):
            if not self.alive:
                break
            assert self.step() or True
        assert not self.alive, "somebody waits for ever"
        assert self.scheduler.is_idle
        self.cache.clear()
        assert self.pool.num_free == self.pool.num_pages


def latents_of(sequence, tokens):
    """Stand for what a model computes: each depends on the whole text before it, and here on who may share it."""
    latents, latent = [], zlib.crc32(sequence.cache_root)
    for token in tokens:
        latents.append(latent := zlib.crc32(bytes([token]), latent))
    return latents


Serving.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestServing = Serving.TestCase


def test_fair_queueing_serves_tenants_by_what_they_got():
    """One tenant with many long requests, one with few short ones: while both wait, their tokens stay close."""
    pool = PagePool(40)
    cache = PrefixCache(pool)
    scheduler = Scheduler(pool, cache, max_running=1, step_tokens=64, lookup=lambda sequence: Found([]))
    for number in range(12):
        length = 60 if number % 3 else 20
        tenant = "greedy" if number % 3 else "modest"
        sequence = Sequence(number, 0, [number] * length, length, tenant=tenant, cache_root=b"r")
        scheduler.add(sequence)
    served = {"greedy": 0, "modest": 0}
    while True:
        (work,) = scheduler.plan()
        scheduler.done(work)
        served[work.sequence.tenant] += work.count
        scheduler.remove(work.sequence)
        waiting = {tenant for _, tenant in scheduler._waiting}
        if len(waiting) < 2:
            break
        assert abs(served["greedy"] - served["modest"]) <= 60, "never further apart than one request"


def test_a_page_can_not_be_freed_twice_or_shared_when_free():
    pool = PagePool(2)
    pages = pool.allocate(2)
    with pytest.raises(MemoryError, match="0 free"):
        pool.allocate(1)
    pool.release(pages)
    with pytest.raises(ValueError, match="free already"):
        pool.release(pages[:1])
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.share(pages[:1])


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CacheIdentity)])
def test_every_part_of_the_identity_changes_the_root(field):
    value = 2 if field == "layout_version" else "other"
    assert dataclasses.replace(IDENTITY, **{field: value}).root != IDENTITY.root


def test_fields_of_the_identity_can_not_run_into_each_other():
    left = dataclasses.replace(IDENTITY, rope_digest="a", tokenizer_digest="tokenizer_digest=b")
    right = dataclasses.replace(IDENTITY, rope_digest="atokenizer_digest=tokenizer_digest=b", tokenizer_digest="")
    assert left.root != right.root


def test_the_longest_unused_units_go_first_and_children_before_parents():
    pool = PagePool(4)
    cache = PrefixCache(pool)
    keys = [bytes([number]) * 16 for number in range(4)]
    pages = pool.allocate(4)
    cache.insert(keys[:2], pages[:2])
    cache.insert(keys[2:], pages[2:])
    pool.release(pages)
    pool.release(cache.match(keys[:2]))
    assert cache.evict(1) == 1
    assert cache.match([keys[3]]) == [], "the leaf of the unused chain went first"
    pool.release(found := cache.match([keys[2]]))
    assert found
    assert cache.evict(4) == 3


def test_units_that_somebody_reads_stay():
    pool = PagePool(2)
    cache = PrefixCache(pool)
    pages = pool.allocate(2)
    keys = [b"a" * 16, b"b" * 16]
    cache.insert(keys, pages)
    assert cache.evict(2) == 0
    pool.release(pages[1:])
    assert cache.evict(2) == 1
    assert pool.num_free == 1
