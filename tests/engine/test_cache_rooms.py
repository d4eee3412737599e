"""Pages, prefix cache and scheduler under random histories: nothing leaks, nothing is shared wrongly, everybody ends."""

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.engine.pages import PagePool
from shoal.engine.prefix_cache import UNIT_TOKENS, CacheIdentity, PrefixCache, unit_key
from shoal.engine.scheduler import Found, Scheduler, Sequence

IDENTITY = CacheIdentity(weights_digest="w", dtype="bf16", layout_version=1, rope_digest="r", tokenizer_digest="t")


class Serving(RuleBasedStateMachine):
    """A scheduler with a model that only writes down which tokens each page holds."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(9)
        self.cache = PrefixCache(self.pool)
        self.scheduler = Scheduler(self.pool, self.cache, max_running=4, step_tokens=100, lookup=self.look_up)
        self.content = [()] * 9
        self.alive = []
        self.count = 0

    def keys(self, sequence, units):
        keys = sequence.unit_keys
        while len(keys) < units:
            part = sequence.token_ids[len(keys) * UNIT_TOKENS : (len(keys) + 1) * UNIT_TOKENS]
            keys.append(unit_key(keys[-1] if keys else IDENTITY.root, part))
        return keys[:units]

    def look_up(self, sequence):
        keys = self.keys(sequence, (len(sequence.token_ids) - 1) // UNIT_TOKENS)
        return Found(self.cache.match(keys[len(sequence.pages) :]))

    @rule(
        length=st.integers(1, 400),
        token=st.integers(0, 1),
        priority=st.integers(0, 1),
        tenant=st.sampled_from("ab"),
        more=st.integers(1, 100),
    )
    def add(self, length, token, priority, tenant, more):
        self.count += 1
        sequence = Sequence(
            request_id=self.count,
            sample=more,
            token_ids=[token] * length,
            prompt_tokens=length,
            tenant=tenant,
            priority=priority,
        )
        self.alive.append(sequence)
        self.scheduler.add(sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data):
        sequence = data.draw(st.sampled_from(self.alive))
        self.alive.remove(sequence)
        self.scheduler.remove(sequence)

    @rule(times=st.integers(1, 20))
    def steps(self, times):
        for _ in range(times):
            self.step()

    def step(self):
        planned = self.scheduler.plan()
        assert sum(work.count for work in planned) <= 100
        assert len({id(work.sequence) for work in planned}) == len(planned)
        for work in planned:
            sequence = work.sequence
            assert work.start == sequence.computed
            assert len(sequence.pages) * UNIT_TOKENS >= work.start + work.count
            self.check_read(sequence)
            for place in range(work.start, work.start + work.count):
                page = sequence.pages[place // UNIT_TOKENS]
                assert self.pool.holders(page) == 1, "a shared page is written"
                kept = self.content[page][: place % UNIT_TOKENS]
                self.content[page] = (*kept, sequence.token_ids[place])
            self.scheduler.done(work)
            full = sequence.computed // UNIT_TOKENS
            if full > sequence.cached_units:
                keys = self.keys(sequence, full)
                first = sequence.cached_units
                self.cache.insert(keys[first:], sequence.pages[first:full], parent=keys[first - 1] if first else None)
                sequence.cached_units = full
            if work.draws:
                sequence.token_ids.append(2)
                if len(sequence.token_ids) >= min(sequence.prompt_tokens + sequence.sample, 9 * UNIT_TOKENS):
                    self.alive.remove(sequence)
                    self.scheduler.remove(sequence)
        return planned

    def check_read(self, sequence):
        """What the sequence believes to be computed is what the pages hold."""
        for unit, page in enumerate(sequence.pages):
            count = min(max(sequence.computed - unit * UNIT_TOKENS, 0), UNIT_TOKENS)
            expected = tuple(sequence.token_ids[unit * UNIT_TOKENS : unit * UNIT_TOKENS + count])
            assert self.content[page][:count] == expected

    @invariant()
    def pages_add_up(self):
        held = {page for sequence in self.alive for page in sequence.pages}
        cached = {unit.page for unit in self.cache._units.values()}
        assert self.pool.num_free + len(held | cached) == self.pool.num_pages
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


Serving.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestServing = Serving.TestCase


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
