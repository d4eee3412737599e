"""Bounds on serving speed against hand computation, counted routing and measurements."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.planner.counts import parameter_counts
from shoal.planner.deployment import (
    WEIGHT_FORMATS,
    Achieved,
    Deployment,
    largest_batch,
    largest_context,
    weight_bytes_by_part,
    weight_bytes_per_device,
)
from shoal.planner.hardware import DEVICES, Cluster, cpu_device
from shoal.planner.published_models import RIVALS
from shoal.planner.roofline import (
    decode_pass,
    expected_distinct_experts,
    expert_parallel_limit,
    prefill_pass,
    speculation_gain,
    speculation_gain_on,
)
from shoal.presets import PRESETS

V3 = PRESETS["v3"]
H800 = DEVICES["h800"]
DECODE_EP144 = Deployment(config=V3, cluster=Cluster(device=H800, count=144))
GQA = ModelConfig(
    vocab_size=1000,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    intermediate_size=96,
    attention="gqa",
)
TWO_CORES = DEVICES["cpu-2core"]


@pytest.mark.parametrize(("experts", "picked", "tokens"), [(256, 8, 1), (16, 4, 3), (6, 6, 2), (10, 1, 25)])
def test_distinct_experts_are_what_random_routing_touches(experts, picked, tokens):
    draw = random.Random(7)
    rounds = 4000
    touched = sum(
        len({expert for _ in range(tokens) for expert in draw.sample(range(experts), picked)}) for _ in range(rounds)
    )
    assert expected_distinct_experts(experts, picked, tokens) == pytest.approx(touched / rounds, rel=0.02)


@given(st.integers(1, 512), st.data(), st.integers(1, 10**6), st.integers(1, 10**6))
def test_distinct_experts_lie_between_k_and_all_and_grow(experts, data, one, other):
    picked = data.draw(st.integers(1, experts))
    few, many = (expected_distinct_experts(experts, picked, tokens) for tokens in sorted((one, other)))
    assert picked * (1 - 1e-12) <= few <= many <= experts


def test_one_token_reads_v3s_active_parameters_and_many_read_what_the_facts_say():
    bf16 = Deployment(config=V3, cluster=Cluster(device=cpu_device(64, 2**41)), weights="bf16")
    for tokens, billions in ((1, 36.6), (2, 56.4), (8, 162.9), (32, 433)):
        read = decode_pass(bf16, num_sequences=tokens, context_tokens=0).read_bytes
        assert sum(read.values()) / 2 / 1e9 == pytest.approx(billions, rel=2e-3)


def test_two_cores_decode_as_fast_as_they_read():
    lite = Deployment(config=PRESETS["v2_lite"], cluster=Cluster(device=TWO_CORES), weights="bf16")
    one = decode_pass(lite, num_sequences=1, context_tokens=1000)
    read_bytes = 2 * (2_451_435_008 + 15_552 * 1000)
    assert one.limited_by == "memory"
    assert one.tokens_per_s == pytest.approx(TWO_CORES.bandwidth_bytes_per_s / read_bytes, rel=1e-9)
    slower = decode_pass(replace(lite, achieved=Achieved(bandwidth_fraction=0.5)), num_sequences=1, context_tokens=1000)
    assert slower.tokens_per_s == pytest.approx(one.tokens_per_s / 2)


def test_stored_parts_are_the_model():
    for name, config in PRESETS.items():
        parts = weight_bytes_by_part(config, WEIGHT_FORMATS["bf16"])
        assert sum(parts.values()) == 2 * parameter_counts(config).total, name
    fp8 = sum(weight_bytes_by_part(V3, WEIGHT_FORMATS["fp8"]).values())
    assert 671e9 < fp8 < 674e9


def test_devices_together_hold_the_model_once_or_more():
    tensor = Deployment(config=V3, cluster=Cluster(device=H800, count=16), layout="tensor_parallel")
    whole = weight_bytes_by_part(V3, WEIGHT_FORMATS["fp8"])
    held = weight_bytes_per_device(tensor)
    assert sum(held.values()) * 16 == pytest.approx(sum(whole.values()))
    spread = weight_bytes_per_device(replace(tensor, layout="expert_parallel"))
    assert spread["attention"] == whole["attention"]
    assert spread["routed_experts"] * 16 == pytest.approx(whole["routed_experts"])
    many = weight_bytes_per_device(Deployment(config=V3, cluster=Cluster(device=H800, count=320)))
    assert many["routed_experts"] * 256 == pytest.approx(whole["routed_experts"])  # one expert each, 64 of them twice


@pytest.mark.parametrize(
    ("tokens_per_s_per_node", "device", "count", "sequences", "context"),
    [
        (14_800, "h800", 144, 153, 4989),  # DeepSeek, day 6; its batch is not published, this one fills the memory
        (22_300, "h100", 72, 256, 2000),  # SGLang on nine nodes, May 2025
    ],
)
def test_measured_decoding_stays_below_the_bound(tokens_per_s_per_node, device, count, sequences, context):
    deployment = Deployment(config=V3, cluster=Cluster(device=DEVICES[device], count=count))
    bound = decode_pass(deployment, num_sequences=sequences * count, context_tokens=context)
    assert tokens_per_s_per_node < bound.tokens_per_s_per_device * 8 < 5 * tokens_per_s_per_node


def test_measured_prefill_stays_below_the_bound():
    deployment = Deployment(config=V3, cluster=Cluster(device=H800, count=32))
    bound = prefill_pass(deployment, num_prompts=128, prompt_tokens=4096)
    assert bound.limited_by == "network"
    assert 62_700 < bound.tokens_per_s_per_device * 8 < 100_000  # DeepSeek's profile of 4K prompts without hits


def test_times_of_a_pass_are_those_of_a_hand_computation():
    cluster = Cluster(device=H800, count=4)
    dense = Deployment(config=GQA, cluster=cluster, weights="bf16")
    step = decode_pass(dense, num_sequences=10, context_tokens=100)
    active = 3 * (2 * 64 * 8 * 10 + 3 * 64 * 96 + 2 * 64) + 64 + 1000 * 64
    cache = 10 * 100 * 3 * 2 * 2 * 8 * 2 / 2  # two key-value heads over four devices: half on each
    assert step.read_bytes["cache"] == cache
    assert step.memory_s == pytest.approx((2 * active / 4 + cache) / 3.35e12)
    assert step.linear_s == pytest.approx(10 * 2 * active / 4 / 989.5e12)
    assert step.attention_s == pytest.approx(10 * 2 * 8 * 16 * 100 * 3 / 4 / 989.5e12)
    assert step.network_s == pytest.approx(2 * 3 * 10 * 64 * 2 * 2 * 3 / 4 / 200e9)
    assert step.pass_s == max(step.memory_s, step.compute_s, step.network_s)


def test_latents_are_kept_by_every_device_under_tensor_parallelism():
    tensor = Deployment(config=V3, cluster=Cluster(device=DEVICES["h200"], count=8), layout="tensor_parallel")
    fit = largest_batch(tensor, 4096)
    assert fit.cache_bytes == fit.sequences * 4096 * 70_272
    spread = largest_batch(replace(tensor, layout="expert_parallel"), 4096)
    assert spread.cache_bytes == spread.sequences / 8 * 4096 * 70_272
    assert spread.sequences > 5 * fit.sequences


def test_memory_divides_into_its_parts_and_the_next_sequence_does_not_fit():
    fit = largest_batch(DECODE_EP144, 4989)
    assert fit.reserve_bytes + fit.weight_bytes + fit.cache_bytes + fit.unused_bytes == pytest.approx(80 * 2**30)
    assert 0 <= fit.unused_bytes < 4989 * 70_272
    assert largest_context(DECODE_EP144, fit.sequences) >= 4989 > largest_context(DECODE_EP144, fit.sequences + 144)
    alone = Deployment(config=V3, cluster=Cluster(device=H800))
    assert largest_batch(alone, 1).sequences == largest_context(alone, 1) == 0
    assert largest_batch(alone, 1).unused_bytes < 0


def test_speculation_follows_its_formula():
    assert speculation_gain(0.85, 1.85 / 1.8 - 1).speedup == pytest.approx(1.8)
    assert speculation_gain(0.0, 0.25).speedup == 0.8
    small = Deployment(config=V3, cluster=Cluster(device=cpu_device(64, 2**41)), weights="int8")
    assert speculation_gain_on(small, 0.85, num_sequences=1, context_tokens=0).speedup == pytest.approx(1.17, abs=0.005)
    dense = Deployment(config=GQA, cluster=Cluster(device=TWO_CORES), weights="bf16")
    long = speculation_gain_on(dense, 0.9, num_sequences=1, context_tokens=10**6)
    assert long.speedup == pytest.approx(
        1.9 / (4 / 3), rel=1e-2
    )  # one layer of three again, nothing else is read twice


def test_expert_traffic_alone_limits_one_sequence():
    assert expert_parallel_limit(V3, 50e9).tpot_ms == pytest.approx(15.11, abs=5e-3)
    assert expert_parallel_limit(V3, 900e9).tokens_per_s == pytest.approx(1191, abs=1)


cluster_sizes = st.sampled_from([1, 2, 7, 8, 16, 144])
formats = st.sampled_from(sorted(WEIGHT_FORMATS))
models = st.sampled_from([V3, PRESETS["v2_lite"], PRESETS["demo"], GQA])


@given(models, cluster_sizes, formats, st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 10**6))
def test_a_pass_takes_longer_with_more_sequences_or_context(config, count, weights, one, other, context):
    deployment = Deployment(config=config, cluster=Cluster(device=H800, count=count), weights=weights)
    few, many = sorted((one, other))
    small = decode_pass(deployment, num_sequences=few, context_tokens=context)
    assert small.pass_s <= decode_pass(deployment, num_sequences=many, context_tokens=context).pass_s
    assert small.pass_s <= decode_pass(deployment, num_sequences=few, context_tokens=context + 1000).pass_s
    assert small.memory_s == pytest.approx(sum(small.read_bytes.values()) / H800.bandwidth_bytes_per_s)
    more = decode_pass(deployment, num_sequences=few * 2 * count, context_tokens=context)
    assert more.tokens_per_s >= small.tokens_per_s * (1 - 1e-12)


@given(models, cluster_sizes, st.integers(1, 500), st.floats(1, 10), st.integers(1, 10**5))
def test_faster_hardware_is_never_slower_and_more_memory_never_holds_less(config, count, sequences, factor, context):
    faster = replace(
        H800,
        bandwidth_bytes_per_s=H800.bandwidth_bytes_per_s * factor,
        memory_bytes=int(H800.memory_bytes * factor),
        link_bytes_per_s=H800.link_bytes_per_s * factor,
    )
    before, after = (Deployment(config=config, cluster=Cluster(device=one, count=count)) for one in (H800, faster))
    for passing in (
        lambda one: decode_pass(one, num_sequences=sequences, context_tokens=context),
        lambda one: prefill_pass(one, num_prompts=sequences, prompt_tokens=context),
    ):
        assert passing(after).pass_s <= passing(before).pass_s
    assert largest_batch(after, context).sequences >= largest_batch(before, context).sequences
    assert largest_batch(after, context + 1).sequences <= largest_batch(after, context).sequences


def test_rivals_can_be_served_too():
    config = RIVALS["llama-3.1-405b"].config
    assert config is not None
    deployment = Deployment(config=config, cluster=Cluster(device=H800, count=8), weights="fp8")
    step = decode_pass(deployment, num_sequences=1, context_tokens=0)
    assert step.tokens_per_s == pytest.approx(8 * 3.35e12 / 406e9, rel=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Deployment(config=V3, cluster=Cluster(device=H800), weights="fp4"), "unknown weight format 'fp4'"),
        (
            lambda: Deployment(config=GQA, cluster=Cluster(device=H800), layout="expert_parallel"),
            "no experts to spread",
        ),
        (lambda: Deployment(config=GQA, cluster=Cluster(device=H800), layout="pipeline"), "layout='pipeline'"),
        (lambda: Deployment(config=V3, cluster=Cluster(device=H800), reserve_fraction=10), "reserve_fraction=10"),
        (lambda: Deployment(config=V3, cluster=Cluster(device=H800), cache_bytes_per_element=0), "bf16 is 2"),
        (
            lambda: Deployment(config=V3, cluster=Cluster(device=replace(H800, network_bytes_per_s=0), count=16)),
            "has no link to other devices",
        ),
        (lambda: Achieved(flops_fraction=0), "flops_fraction=0 must be above 0"),
        (lambda: Achieved(bandwidth_fraction=float("nan")), "bandwidth_fraction=nan"),
        (lambda: decode_pass(DECODE_EP144, num_sequences=0, context_tokens=1), "num_sequences=0"),
        (lambda: prefill_pass(DECODE_EP144, num_prompts=1, prompt_tokens=0), "prompt_tokens=0"),
        (lambda: largest_batch(DECODE_EP144, 0), "context_tokens=0"),
        (lambda: expected_distinct_experts(4, 5, 1), "num_experts_per_tok=5 exceeds num_experts=4"),
        (lambda: expert_parallel_limit(GQA, 50e9), "a dense model sends nothing"),
        (lambda: speculation_gain(85), "acceptance_fraction=85 must be from 0 to 1"),
        (lambda: speculation_gain(0.85, -0.1), "extra_cost_fraction=-0.1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
