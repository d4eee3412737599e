"""One trained model, one answer: whatever the caches, chunks, neighbours, preemptions and guesses, the tokens are the same.

The reference is the simple engine, which has none of these. Greedy and sampled requests of mixed lengths, seeds fixed.
"""

import dataclasses
import random

import pytest

from shoal.engine.disk_cache import DiskCache
from shoal.engine.engine import Engine
from shoal.engine.grammar import Form, GrammarConstraint
from shoal.engine.packed_model import PackedModel
from shoal.engine.prefix_cache import UNIT_TOKENS, CacheIdentity
from shoal.engine.request import Request, SamplingParams
from shoal.engine.serving import ServingConfig, ServingEngine
from shoal.engine.speculative import Drafter, Speculation
from shoal.kernels.cpu.build import library
from tests.engine.running import generate

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: the simple engine serves")

IDENTITY = CacheIdentity(weights_digest="a", dtype="bf16", layout_version=2, rope_digest="r", tokenizer_digest="t")
LENGTHS = (7, 64, 65, 130, 300, 128, 20, 200)


@pytest.fixture(scope="module")
def packed(trained):
    return PackedModel(trained.model.config, trained.model.state_dict().__getitem__, "bf16")


@pytest.fixture(scope="module")
def requests(trained):
    rng = random.Random(1)
    starts = [rng.randrange(20_000) for _ in LENGTHS]
    return [
        Request(
            prompt_ids=tuple(trained.token_ids[start : start + length]),
            sampling=SamplingParams(max_tokens=40, seed=index, temperature=0.0 if index % 2 else 0.9),
        )
        for index, (start, length) in enumerate(zip(starts, LENGTHS))
    ]


@pytest.fixture(scope="module")
def expected(trained, requests):
    """Every request by itself through the simple engine: batch 1."""
    return [[Engine(trained.model).generate([request])[0][0].token_ids] for request in requests]


def serving(packed, **sizes):
    return ServingEngine(packed, ServingConfig(**{"cache_bytes": 1 << 24} | sizes), identity=IDENTITY)


def pages(packed, count):
    return count * UNIT_TOKENS * packed.config.num_hidden_layers * packed.config.cache_width * 2


def test_the_model_has_learnt_something(trained):
    assert trained.last_loss < 0.4 * trained.first_loss
    assert trained.mtp_acceptance > 0.5


def test_batch_of_one_equals_batch_of_eight(packed, requests, expected):
    assert [generate(serving(packed), [request])[0][0] for request in requests] == expected
    assert generate(serving(packed), requests)[0] == expected


def test_neighbours_may_join_and_leave(trained, packed, requests, expected):
    engine = serving(packed)
    rng = random.Random(2)
    guests = []

    def between(step):
        if step < 60 and step % 2:
            prompt = tuple(trained.token_ids[:: rng.randint(2, 9)][: rng.randint(1, 150)])
            guests.append(
                engine.add(Request(prompt_ids=prompt, sampling=SamplingParams(max_tokens=rng.randint(1, 30))))
            )
        if step % 5 == 0 and guests:
            engine.cancel(guests.pop(rng.randrange(len(guests))))

    assert generate(engine, requests, between)[0] == expected


@pytest.mark.parametrize("step_tokens", [1, 33, 64, 100])
def test_a_prompt_in_chunks_equals_the_whole(packed, requests, expected, step_tokens):
    assert generate(serving(packed, step_tokens=step_tokens), requests)[0] == expected


def test_a_hit_equals_a_miss_from_ram_from_disk_and_after_a_restart(packed, requests, expected, tmp_path):
    all_units = [(length - 1) // UNIT_TOKENS * UNIT_TOKENS for length in LENGTHS]

    def opened(engine):
        engine.disk = DiskCache(tmp_path, max_bytes=1 << 30, max_age_s=1000, unit_bytes=engine.unit_bytes)
        return engine

    engine = opened(serving(packed))
    assert generate(engine, requests) == (expected, [0] * len(requests))
    assert generate(engine, requests) == (expected, all_units), "RAM"
    engine.prefix.clear()
    engine.disk.flush()
    assert generate(engine, requests) == (expected, all_units), "disk"
    assert engine.disk.stats.hits == sum(all_units) // UNIT_TOKENS
    engine.disk.close()
    engine = opened(serving(packed))
    assert generate(engine, requests) == (expected, all_units), "disk, after a restart"
    assert engine.disk.stats.hits == sum(all_units) // UNIT_TOKENS
    engine.disk.close()


def test_a_preempted_answer_equals_an_undisturbed_one(packed, requests, expected):
    engine = serving(packed, cache_bytes=pages(packed, 7))
    assert generate(engine, requests)[0] == expected
    assert engine.stats.preemptions > 0


@pytest.mark.parametrize("num_guesses", [1, 2])
def test_speculative_equals_plain(trained, packed, requests, expected, num_guesses):
    """With the gauge that serves, which mixes steps with, without and beside guesses."""
    source = trained.model.state_dict().__getitem__
    speculation = Speculation(Drafter(packed, source), num_guesses)
    engine = ServingEngine(packed, ServingConfig(cache_bytes=1 << 24), identity=IDENTITY, speculation=speculation)
    for _ in range(3):
        assert generate(engine, requests)[0] == expected
    assert sum(engine.stats.accepted) > 20


def test_a_grammar_that_allows_everything_equals_none(trained, packed, requests, expected):
    tokenizer = trained.tokenizer
    free = [
        dataclasses.replace(
            request,
            sampling=dataclasses.replace(
                request.sampling, constraint=lambda: GrammarConstraint(tokenizer, Form("regex", r"(?s:.*)"))
            ),
        )
        for request in requests
    ]
    # A form knows no special tokens: where the model writes one, the two must part.
    special = set(tokenizer.special_tokens.values())
    for got, plain in zip(generate(serving(packed), free)[0], expected):
        until = next((place for place, token in enumerate(plain[0]) if token in special), len(plain[0]))
        assert until > 20
        assert got[0][:until] == plain[0][:until]


def test_samples_of_one_request_equal_requests_of_one_sample(trained, packed):
    """n samples share the prompt's pages; each draws from its own seed, as the simple engine's do."""
    request = Request(
        prompt_ids=tuple(trained.token_ids[:100]), sampling=SamplingParams(max_tokens=30, seed=5, num_samples=4)
    )
    together = generate(serving(packed), [request])[0][0]
    assert together == [completion.token_ids for completion in Engine(trained.model).generate([request])[0]]
    assert len({tuple(tokens) for tokens in together}) == 4
