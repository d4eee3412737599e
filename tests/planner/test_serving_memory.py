"""Serving memory: published bytes, what the expert layout gains, and the laws of any plan."""

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.planner.counts import cache_bytes_per_token, parameter_counts
from shoal.planner.hardware import device, parse_fit
from shoal.planner.memory import fits
from shoal.planner.published_models import RIVALS
from shoal.planner.rivals import fp8_checkpoint
from shoal.planner.serving_memory import (
    ServingPlan,
    fewest_devices,
    longest_context,
    most_sequences,
    served_cache_bytes_per_token,
    serving_memory,
)
from shoal.presets import PRESETS, small, v2_lite, v3

FAST = settings(max_examples=60, deadline=None, derandomize=True)
LLAMA = RIVALS["llama-3.1-405b"].config
MODELS: dict[str, ModelConfig] = {**PRESETS, **({"llama-3.1-405b": LLAMA} if LLAMA else {})}


@st.composite
def plans(draw: st.DrawFn) -> ServingPlan:
    return ServingPlan(
        weights=draw(st.sampled_from(["fp32", "bf16", "fp8", "int8", "int4"])),
        cache=draw(st.sampled_from(["fp32", "bf16", "fp8"])),
        num_sequences=draw(st.integers(1, 300)),
        context_tokens=draw(st.integers(1, 200_000)),
        num_devices=draw(st.integers(1, 400)),
        layout=draw(st.sampled_from(["tensor", "expert"])),
        chunk_tokens=draw(st.integers(1, 4096)),
        with_mtp=draw(st.booleans()),
    )


@FAST
@given(st.sampled_from(sorted(MODELS)), plans())
def test_the_total_is_its_parts_and_halving_the_devices_never_reduces_it(name: str, plan: ServingPlan) -> None:
    memory = serving_memory(MODELS[name], plan)
    assert memory.total_bytes == sum(dataclasses.astuple(memory)) == sum(memory.by_part().values())
    half = replace(plan, num_devices=max(1, plan.num_devices // 2))
    assert serving_memory(MODELS[name], half).total_bytes >= memory.total_bytes


@FAST
@given(st.sampled_from(sorted(MODELS)), plans(), st.sampled_from(["num_sequences", "context_tokens", "chunk_tokens"]))
def test_more_of_anything_never_needs_less(name: str, plan: ServingPlan, field: str) -> None:
    more = replace(plan, **{field: getattr(plan, field) + 7})
    assert serving_memory(MODELS[name], more).total_bytes >= serving_memory(MODELS[name], plan).total_bytes


def test_weights_of_v3_in_fp8_are_the_released_files_without_the_copied_tables() -> None:
    config, released = v3(), fp8_checkpoint(v3())
    tables = 2 * (2 * config.vocab_size * config.hidden_size)  # the MTP module's own embedding and head, in bf16
    ours = serving_memory(config, ServingPlan(weights="fp8", with_mtp=True)).weights
    assert released.fp8_bytes == 680_571_043_840
    assert ours == pytest.approx(released.total_bytes - tables, rel=1e-6)


def test_weights_in_bf16_are_two_bytes_for_every_parameter() -> None:
    for config in MODELS.values():
        assert serving_memory(config, ServingPlan()).weights == 2 * parameter_counts(config).total


def test_a_bf16_cache_is_the_published_one_and_an_fp8_latent_656_bytes_a_layer() -> None:
    assert served_cache_bytes_per_token(v3(), ServingPlan()) == cache_bytes_per_token(v3()) == 70_272
    assert served_cache_bytes_per_token(v3(), ServingPlan(cache="fp8")) == 61 * 656
    # FlashMLA's documents: a request of 128K tokens in bf16, with the MTP layer's cache, is 8.72 GiB.
    drafting = served_cache_bytes_per_token(v3(), ServingPlan(with_mtp=True)) * 131072 / 2**30
    assert drafting == pytest.approx(8.72, abs=0.005)


def test_a_grouped_cache_in_fp8_adds_one_scale_per_head() -> None:
    assert LLAMA is not None
    assert served_cache_bytes_per_token(LLAMA, ServingPlan(cache="fp8")) == 126 * (2 * 8 * 128 + 2 * 8 * 4)


def test_dealing_experts_leaves_room_for_more_sequences_than_cutting_every_matrix() -> None:
    # Cut over heads a latent is kept whole by every device; with whole attention each device has its own sequences.
    plan = ServingPlan(weights="fp8", num_devices=16)
    dealt, cut = (most_sequences(v3(), device("h800"), replace(plan, layout=one)) for one in ("expert", "tensor"))
    assert dealt > 5 * cut > 0


def test_a_grouped_cache_divides_by_its_heads_and_a_latent_does_not() -> None:
    assert LLAMA is not None
    plan = ServingPlan(num_sequences=8, context_tokens=1000, layout="tensor")
    for config, share in ((LLAMA, 8), (v3(), 1)):
        one, sixteen = (serving_memory(config, replace(plan, num_devices=count)).cache for count in (1, 16))
        assert one == share * sixteen


def test_the_fewest_devices_fit_and_one_less_does_not() -> None:
    config, card = v3(), device("h800")
    for plan in (ServingPlan(weights="fp8"), ServingPlan(weights="fp8", layout="tensor"), ServingPlan(weights="int4")):
        count = fewest_devices(config, card, plan)
        assert count is not None
        assert count > 1
        for devices, fit in ((count, True), (count - 1, False)):
            needed = serving_memory(config, replace(plan, num_devices=devices)).total_bytes
            assert fits(needed, card).fits is fit


def test_what_never_fits_says_so() -> None:
    card = parse_fit("2 cores, 1 GiB").device
    assert fewest_devices(v3(), card, ServingPlan()) is None
    assert most_sequences(v3(), card, ServingPlan()) == 0
    assert longest_context(v3(), card, ServingPlan()) == 0


def test_the_small_model_fits_two_cores_with_room_for_a_long_context() -> None:
    machine, plan = parse_fit("2 cores, 24 GiB").device, ServingPlan(weights="int8", cache="fp32")
    context = longest_context(small(), machine, plan)
    memory = serving_memory(small(), replace(plan, context_tokens=context))
    assert fits(memory.total_bytes, machine).fits
    assert not fits(serving_memory(small(), replace(plan, context_tokens=context + 1)).total_bytes, machine).fits
    assert memory.cache == context * 12 * 576 * 4


def test_v2_lite_needs_eight_bits_or_fewer_on_24_gib() -> None:
    machine = parse_fit("2 cores, 24 GiB").device
    held = {
        weights: fits(serving_memory(v2_lite(), ServingPlan(weights=weights)).total_bytes, machine).fits
        for weights in ("bf16", "fp8", "int8", "int4")
    }
    assert held == {"bf16": False, "fp8": True, "int8": True, "int4": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "fp7"}, "weights='fp7' is unknown, did you mean 'fp8'"),
        ({"cache": "int4"}, "cache='int4' is unknown"),
        ({"layout": "pipeline"}, "layout='pipeline' is unknown"),
        ({"num_sequences": 0}, "num_sequences=0"),
        ({"context_tokens": 1e6}, "context_tokens=1000000.0 must be a whole number"),
    ],
)
def test_plans_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServingPlan(**change)
