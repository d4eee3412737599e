"""The serving engine gives the simple engine's tokens, whatever its caches, chunks, neighbours and preemptions."""

import dataclasses
import random

import pytest
import torch

from shoal.engine.disk_cache import DiskCache
from shoal.engine.engine import Engine
from shoal.engine.packed_model import PackedModel
from shoal.engine.prefix_cache import UNIT_TOKENS, CacheIdentity
from shoal.engine.request import Request, SamplingParams
from shoal.engine.serving import ServingConfig, ServingEngine
from shoal.errors import RequestError
from shoal.kernels.cpu.build import library
from shoal.model.layers import set_compute_dtype
from shoal.model.transformer import Transformer, initialise
from shoal.presets import preset
from tests.engine.running import generate

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: the simple engine serves")

CONFIG = preset("demo").replace(vocab_size=300, max_position_embeddings=1024, initializer_range=0.2)
IDENTITY = CacheIdentity(weights_digest="a", dtype="bf16", layout_version=1, rope_digest="r", tokenizer_digest="t")
LENGTHS = (5, 64, 65, 200, 300, 64, 130)


@pytest.fixture(scope="module")
def model():
    model = Transformer(CONFIG)
    initialise(model, 0)
    set_compute_dtype(model, torch.bfloat16)
    return model.eval()


@pytest.fixture(scope="module")
def requests():
    rng = random.Random(0)
    return [
        Request(
            prompt_ids=tuple(rng.randrange(300) for _ in range(length)),
            sampling=SamplingParams(max_tokens=20, seed=index, num_samples=2, temperature=0.0 if index == 1 else 1.0),
        )
        for index, length in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def expected(model, requests):
    return [[completion.token_ids for completion in group] for group in Engine(model).generate(requests)]


def serving(model, **sizes):
    return ServingEngine(
        PackedModel(CONFIG, model.state_dict().__getitem__, "bf16"),
        ServingConfig(**{"cache_bytes": 1 << 24} | sizes),
        identity=IDENTITY,
    )


def pages(count):
    return count * UNIT_TOKENS * CONFIG.num_hidden_layers * CONFIG.cache_width * 2


@pytest.mark.parametrize(
    "sizes",
    [{}, {"step_tokens": 48}, {"step_tokens": 1}, {"max_running": 1}, {"max_running": 3}, {"cache_bytes": pages(7)}],
    ids=str,
)
def test_tokens_do_not_depend_on_chunks_neighbours_or_preemptions(model, requests, expected, sizes):
    engine = serving(model, **sizes)
    assert generate(engine, requests)[0] == expected
    assert engine.pool.num_free + len(engine.prefix) == engine.pool.num_pages


def test_a_pool_that_is_too_small_for_all_sends_somebody_back(model):
    long = [
        Request(prompt_ids=(9,) * length, sampling=SamplingParams(max_tokens=140, seed=length)) for length in (60, 50)
    ]
    engine = serving(model, cache_bytes=pages(5))
    tokens = generate(engine, long)[0]
    assert engine.stats.preemptions > 0
    assert tokens == [[completion.token_ids for completion in group] for group in Engine(model).generate(long)]


def test_a_prompt_read_before_is_found_and_gives_the_same_tokens(model, requests, expected):
    engine = serving(model)
    assert generate(engine, requests) == (expected, [0] * len(requests))
    again, found = generate(engine, requests)
    assert again == expected
    assert found == [(length - 1) // UNIT_TOKENS * UNIT_TOKENS for length in LENGTHS]


def test_what_was_generated_is_found_when_it_comes_back(model, requests):
    engine = serving(model)
    prompt = requests[3].prompt_ids
    answer = generate(engine, [Request(prompt_ids=prompt, sampling=SamplingParams(max_tokens=100, seed=1))])[0][0][0]
    longer = Request(prompt_ids=(*prompt, *answer, 7), sampling=SamplingParams(max_tokens=1))
    assert generate(engine, [longer])[1] == [(len(prompt) + len(answer)) // UNIT_TOKENS * UNIT_TOKENS]


def test_disk_units_survive_a_restart_and_give_the_same_tokens(model, requests, expected, tmp_path):
    for expected_found in (False, True):
        engine = serving(model)
        engine.disk = DiskCache(tmp_path, max_bytes=1 << 30, max_age_s=1000, unit_bytes=engine.unit_bytes)
        tokens, found = generate(engine, requests)
        assert tokens == expected
        assert (sum(found) > 0) == expected_found
        engine.disk.close()


def test_another_weights_digest_or_isolation_finds_nothing(model, requests, tmp_path):
    first = serving(model)
    first.disk = DiskCache(tmp_path, max_bytes=1 << 30, max_age_s=1000, unit_bytes=first.unit_bytes)
    generate(first, requests)
    assert generate(first, [dataclasses.replace(requests[4], isolation="other")])[1] == [0]
    first.disk.flush()
    second = serving(model)
    second.identity = dataclasses.replace(IDENTITY, weights_digest="b")
    second.disk = first.disk
    assert sum(generate(second, requests)[1]) == 0
    first.disk.close()


def test_a_long_prompt_does_not_stop_running_answers(model):
    engine = serving(model, step_tokens=64)
    short = engine.add(Request(prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=50)))
    engine.step()
    engine.add(Request(prompt_ids=(5,) * 900, sampling=SamplingParams(max_tokens=1)))
    for _ in range(10):
        assert [event.request_id for event in engine.step()] == [short]


def test_cancelled_requests_give_their_pages_back_at_once(model, requests):
    engine = serving(model)
    ids = [engine.add(request) for request in requests]
    engine.step()
    for request_id in ids:
        engine.cancel(request_id)
    assert engine.is_idle
    assert engine.pool.num_free + len(engine.prefix) == engine.pool.num_pages
    engine.cancel(99)


def test_higher_priority_goes_first_and_tenants_take_turns(model):
    engine = serving(model, max_running=1)
    sampling = SamplingParams(max_tokens=3)
    order = [
        engine.add(Request(prompt_ids=(1, 2, 3), sampling=sampling, tenant=tenant, priority=priority))
        for tenant, priority in (("a", 0), ("a", 0), ("a", 0), ("b", 0), ("c", 1))
    ]
    ended = []
    while not engine.is_idle:
        ended += [event.request_id for event in engine.step() if event.finish_reason]
    a1, a2, a3, b1, c1 = order
    assert ended[0] == c1
    assert ended.index(b1) < ended.index(a2) < ended.index(a3)
    assert ended.index(a1) < ended.index(a2)


def test_requests_that_can_never_fit_are_refused(model):
    engine = serving(model, cache_bytes=pages(2))
    with pytest.raises(RequestError, match="context of 128"):
        engine.add(Request(prompt_ids=(1,) * 100, sampling=SamplingParams(max_tokens=60)))
    with pytest.raises(RequestError, match="empty"):
        engine.add(Request(prompt_ids=()))
    with pytest.raises(RequestError, match=r"0\.\.299"):
        engine.add(Request(prompt_ids=(300,)))


def test_scores_that_are_not_finite_end_that_request_alone(model, requests):
    state = dict(model.state_dict())
    state["embed_tokens.weight"] = state["embed_tokens.weight"].clone()
    state["embed_tokens.weight"][299] = float("nan")
    engine = ServingEngine(PackedModel(CONFIG, state.__getitem__, "bf16"), ServingConfig(cache_bytes=1 << 24))
    bad = engine.add(Request(prompt_ids=(1, 299, 2), sampling=SamplingParams(max_tokens=4)))
    good = engine.add(Request(prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=4, temperature=0.0)))
    events = []
    while not engine.is_idle:
        events += engine.step()
    assert [(event.token_id, event.finish_reason) for event in events if event.request_id == bad] == [(None, "error")]
    alone = serving(model)
    alone.add(Request(prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=4, temperature=0.0)))
    expected = []
    while not alone.is_idle:
        expected += [event.token_id for event in alone.step()]
    assert [event.token_id for event in events if event.request_id == good] == expected
