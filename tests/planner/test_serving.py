"""Bounds on serving speed against hand computation and measurements; DeepSeek's published day to its published digits."""

import random
from dataclasses import replace
from datetime import datetime, timezone
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.planner.counts import parameter_counts
from shoal.planner.hardware import DEVICES, Cluster, cpu_device
from shoal.planner.prices import price_at
from shoal.planner.rivals import RIVALS
from shoal.planner.serving import (
    PUBLISHED_LOAD,
    PUBLISHED_START_UTC,
    WEIGHT_FORMATS,
    Achieved,
    Deployment,
    Load,
    decode_pass,
    expected_distinct_experts,
    expert_parallel_limit,
    largest_batch,
    largest_context,
    margin,
    nodes_needed,
    not_recomputed,
    over_hit_rate,
    prefill_pass,
    published_day,
    published_figures,
    service_cost,
    speculation_gain,
    speculation_gain_on,
    weight_bytes_by_part,
    weight_bytes_per_device,
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
R1 = price_at("deepseek-reasoner", PUBLISHED_START_UTC)


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


@pytest.mark.parametrize("figure", published_figures(), ids=lambda figure: figure.name)
def test_published_serving_figures_are_recomputed(figure):
    assert figure.agrees, f"{figure.published} {figure.unit} published, {figure.ours} ours"
    assert figure.source and figure.formula


def test_the_published_day_closes_to_the_digit():
    cost, earned = published_day()
    assert cost.usd == 87_072
    assert (earned.hit_usd, earned.miss_usd, earned.output_usd) == (Decimal(47_880), Decimal(146_300), Decimal(367_920))
    assert earned.revenue_usd == 562_100
    assert earned.profit_over_cost_fraction == pytest.approx(5.4556, abs=1e-4)
    assert earned.profit_over_revenue_fraction == pytest.approx(0.845, abs=1e-3)
    assert cost.usd_per_million_input_tokens * 608e3 + cost.usd_per_million_output_tokens * 168e3 == pytest.approx(
        87_072
    )


def test_what_stays_open_is_said_in_words():
    ours = {one.figure: one.ours for one in not_recomputed()}
    assert ours["electricity of DeepSeek's day"].startswith("54 to 69 MWh, 1.2 to 1.5 J per output token")
    assert ours["real income of DeepSeek's day"].startswith("140,280 to 562,100 USD")
    assert all(one.why and one.published for one in not_recomputed())


def test_the_cache_cut_the_published_input_bill_by_42_percent():
    without, with_hits = over_hit_rate(R1, PUBLISHED_START_UTC, 0.06, [0.0, PUBLISHED_LOAD.hit_fraction])
    assert without.price_usd * 608e3 == pytest.approx(334_400)
    assert with_hits.price_usd * 608e3 == pytest.approx(194_180)
    assert with_hits.saved_fraction == pytest.approx(0.419, abs=5e-4)
    assert (without.saved_fraction, without.cost_usd) == (0, 0.06)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 10))
def test_a_higher_hit_rate_costs_neither_side_more(one, other, miss_cost):
    low, high = over_hit_rate(R1, PUBLISHED_START_UTC, miss_cost, sorted((one, other)))
    assert high.price_usd <= low.price_usd + 1e-12
    assert high.cost_usd <= low.cost_usd
    assert high.saved_fraction >= low.saved_fraction - 1e-12


def test_nodes_carry_their_load_and_hits_need_none_when_only_computing_counts():
    load = Load(hit_tokens=600, miss_tokens=400, output_tokens=300, period_s=10)
    computing = nodes_needed(load, input_tokens_per_s_per_node=4, output_tokens_per_s_per_node=6, counts_hits=False)
    assert (computing.prefill_nodes, computing.decode_nodes, computing.nodes) == (10, 5, 15)
    counting = nodes_needed(load, input_tokens_per_s_per_node=4, output_tokens_per_s_per_node=6, counts_hits=True)
    assert counting.prefill_nodes == 25


def test_a_bill_is_rent_and_joules_of_its_two_parts():
    load = Load(hit_tokens=0, miss_tokens=4 * 10**6, output_tokens=10**6, period_s=3600)
    node = Cluster(device=H800, count=8).cost_assumptions()
    node = replace(node, pue=node.pue.with_value(1.25, "test"))
    fleet = nodes_needed(load, input_tokens_per_s_per_node=1000, output_tokens_per_s_per_node=100, counts_hits=True)
    cost = service_cost(load, fleet, node)
    hours = 4e6 / 1000 / 3600, 1e6 / 100 / 3600
    assert cost.usd == pytest.approx(16 * sum(hours))
    assert cost.usd_per_million_input_tokens == pytest.approx(16 * hours[0] / 4)
    assert cost.usd_per_million_output_tokens == pytest.approx(16 * hours[1])
    assert cost.joules == pytest.approx(10_200 * 1.25 * 3600 * sum(hours))
    assert cost.joules_per_million_tokens == pytest.approx(cost.joules / 5)
    assert cost.joules_per_output_token == pytest.approx(cost.joules / 1e6)


def test_rivals_can_be_served_too():
    config = RIVALS["llama-3.1-405b"].config
    assert config is not None
    deployment = Deployment(config=config, cluster=Cluster(device=H800, count=8), weights="fp8")
    step = decode_pass(deployment, num_sequences=1, context_tokens=0)
    assert step.tokens_per_s == pytest.approx(8 * 3.35e12 / 406e9, rel=0.01)


def test_free_tokens_have_no_margin():
    nothing = margin(PUBLISHED_LOAD, _free(), datetime(2025, 3, 1, tzinfo=timezone.utc), 10.0)
    assert nothing.profit_over_cost_fraction == -1
    assert nothing.profit_over_revenue_fraction == float("-inf")


def _free():
    zero = Decimal(0)
    return replace(
        R1,
        hit_usd_per_mtok=zero,
        miss_usd_per_mtok=zero,
        output_usd_per_mtok=zero,
        off_peak_usd_per_mtok=(zero, zero, zero),
    )


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
        (lambda: Load(hit_tokens=-1, miss_tokens=1, output_tokens=1), "hit_tokens=-1"),
        (lambda: Load(hit_tokens=0, miss_tokens=0, output_tokens=1), "at least one prompt token"),
        (lambda: Load(hit_tokens=0, miss_tokens=1, output_tokens=1, period_s=0), "period_s=0"),
        (
            lambda: nodes_needed(
                PUBLISHED_LOAD, input_tokens_per_s_per_node=0, output_tokens_per_s_per_node=1, counts_hits=True
            ),
            "input_tokens_per_s_per_node=0",
        ),
        (lambda: margin(PUBLISHED_LOAD, R1, PUBLISHED_START_UTC, 0), "cost_usd=0"),
        (lambda: over_hit_rate(R1, PUBLISHED_START_UTC, 1.0, [1.5]), "hit_fraction=1.5"),
        (lambda: over_hit_rate(R1, PUBLISHED_START_UTC, -1.0, [0.5]), "miss_cost_usd_per_million=-1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
