"""Training memory: exact bytes where they can be counted by hand, and the laws that any split must keep."""

import dataclasses
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.planner.activations import RECIPES, layer_activations, recipe
from shoal.planner.counts import parameter_counts
from shoal.planner.hardware import GIB, device, parse_fit
from shoal.planner.memory import (
    Split,
    TrainingPlan,
    fits,
    largest,
    largest_micro_batch,
    largest_sequence,
    layer_parameters,
    smallest_split,
    training_memory,
)
from shoal.presets import demo, mini, v2, v2_lite, v3

FAST = settings(max_examples=60, deadline=None, derandomize=True)
V3_SPLIT = Split(data=128, expert=64, pipeline=16, shard="optimizer", schedule="dualpipe")


@st.composite
def configs(draw: st.DrawFn, uniform: bool = False) -> ModelConfig:
    """Small models of every kind; `uniform` ones have equal layers, a multiple of four."""
    layers = 4 * draw(st.integers(1, 3)) if uniform else draw(st.integers(1, 9))
    experts = draw(st.one_of(st.none(), st.integers(4, 12)))
    return ModelConfig(
        vocab_size=draw(st.integers(16, 300)),
        hidden_size=8 * draw(st.integers(1, 12)),
        num_hidden_layers=layers,
        num_attention_heads=2 * draw(st.integers(1, 4)),
        intermediate_size=draw(st.integers(1, 200)),
        attention=draw(st.sampled_from(["mla", "gqa"])),
        num_key_value_heads=draw(st.sampled_from([1, 2])),
        head_dim=2 * draw(st.integers(1, 8)),
        q_lora_rank=draw(st.one_of(st.none(), st.integers(1, 40))),
        kv_lora_rank=draw(st.integers(1, 40)),
        qk_nope_head_dim=draw(st.integers(1, 16)),
        qk_rope_head_dim=2 * draw(st.integers(1, 8)),
        v_head_dim=draw(st.integers(1, 16)),
        n_routed_experts=experts,
        n_shared_experts=draw(st.integers(0, 2)),
        num_experts_per_tok=draw(st.integers(1, 4)),
        moe_intermediate_size=draw(st.integers(1, 60)),
        first_k_dense_replace=0 if uniform else draw(st.integers(0, layers - 1)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        tie_word_embeddings=draw(st.booleans()),
    )


@st.composite
def plans(draw: st.DrawFn) -> TrainingPlan:
    return TrainingPlan(
        recipe=draw(st.sampled_from(list(RECIPES.values()))),
        split=Split(shard=draw(st.sampled_from(["none", "optimizer", "all"]))),
        micro_batch=draw(st.integers(1, 4)),
        sequence_tokens=draw(st.integers(1, 300)),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
        loss_chunk_tokens=draw(st.one_of(st.none(), st.integers(1, 200))),
    )


@FAST
@given(configs())
def test_layers_tables_and_the_last_norm_are_every_parameter_there_is(config: ModelConfig) -> None:
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    counts = parameter_counts(config)
    rest = counts.embedding + counts.head + config.hidden_size
    assert sum(layer_parameters(config, layer).total for layer in range(layers)) + rest == counts.stored


@FAST
@given(configs(), plans())
def test_one_device_holds_the_recipes_bytes_for_every_parameter(config: ModelConfig, plan: TrainingPlan) -> None:
    memory = training_memory(config, replace(plan, recipe=recipe("fp32")))
    stored = parameter_counts(config).stored
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * stored, 4 * stored, 8 * stored)
    assert memory.master_weights == memory.gathered == 0
    assert memory.total_bytes == sum(dataclasses.astuple(memory)) == sum(memory.by_part().values())


@FAST
@given(configs(), plans(), st.sampled_from(["vocab_size", "intermediate_size", "num_hidden_layers", "kv_lora_rank",
       "v_head_dim", "qk_nope_head_dim", "num_attention_heads", "hidden_size", "n_shared_experts", "head_dim",
       "num_nextn_predict_layers", "moe_intermediate_size", "n_routed_experts"]))  # fmt: skip
def test_a_larger_model_never_needs_less(config: ModelConfig, plan: TrainingPlan, name: str) -> None:
    value = getattr(config, name)
    if value is None:
        return
    larger = config.replace(**{name: value + 2})
    assert training_memory(larger, plan).total_bytes >= training_memory(config, plan).total_bytes


@FAST
@given(configs(), plans(), st.sampled_from(["micro_batch", "sequence_tokens"]), st.integers(1, 50))
def test_more_tokens_at_once_never_need_less(config: ModelConfig, plan: TrainingPlan, name: str, more: int) -> None:
    wider = replace(plan, **{name: getattr(plan, name) + more})
    assert training_memory(config, wider).total_bytes >= training_memory(config, plan).total_bytes


@FAST
@given(configs(), plans(), st.integers(1, 5), st.integers(0, 3), st.integers(1, 4))
def test_halving_the_data_parallel_devices_never_reduces_memory_per_device(
    config: ModelConfig, plan: TrainingPlan, data_power: int, expert_power: int, pipeline: int
) -> None:
    data, expert = 2**data_power, 2 ** min(data_power, expert_power)
    expert = min(expert, 4) if config.n_routed_experts else 1
    split = replace(plan.split, data=data, expert=expert, pipeline=min(pipeline, config.num_hidden_layers))
    half = replace(split, data=data // 2, expert=min(expert, data // 2))
    whole_bytes = training_memory(config, replace(plan, split=split)).total_bytes
    assert training_memory(config, replace(plan, split=half)).total_bytes >= whole_bytes


@FAST
@given(configs(uniform=True), plans(), st.sampled_from([2, 4]), st.sampled_from([1, 2]))
def test_halving_the_pipeline_never_reduces_memory_per_device(
    config: ModelConfig, plan: TrainingPlan, pipeline: int, data: int
) -> None:
    split = replace(plan.split, data=data, pipeline=pipeline)
    half = replace(split, pipeline=pipeline // 2)
    whole_bytes = training_memory(config, replace(plan, split=split)).total_bytes
    assert training_memory(config, replace(plan, split=half)).total_bytes >= whole_bytes


@FAST
@given(configs(), plans(), st.integers(1, 3))
def test_dealing_experts_wider_never_needs_more(config: ModelConfig, plan: TrainingPlan, power: int) -> None:
    experts = config.n_routed_experts or 1
    width = 2**power
    if experts % width:
        return
    narrow, wide = (replace(plan.split, data=8, expert=expert) for expert in (width // 2, width))
    assert (
        training_memory(config, replace(plan, split=wide)).total_bytes
        <= training_memory(config, replace(plan, split=narrow)).total_bytes
    )


def test_v3_fits_its_published_split_because_it_recomputes() -> None:
    # V3 §3.2: 16 stages, 64 expert devices, ZeRO-1, DualPipe, rows of 4K, no tensor parallelism, on 80 GiB cards.
    plan = TrainingPlan(recipe=recipe("deepseek_fp8"), split=V3_SPLIT)
    needed = training_memory(v3(), plan).total_bytes
    assert fits(needed, device("h800")).fits
    assert 60 * GIB < needed < 72 * GIB
    kept_all = training_memory(v3(), replace(plan, recompute="none"))
    assert not fits(kept_all.total_bytes, device("h800"), reserve_fraction=0).fits
    usual = training_memory(v3(), replace(plan, recipe=recipe("bf16")))
    assert not fits(usual.total_bytes, device("h800")).fits
    assert V3_SPLIT.num_devices == 2048


def test_a_pipeline_keeps_as_many_micro_batches_as_it_has_stages() -> None:
    config = ModelConfig(vocab_size=16, hidden_size=8, num_hidden_layers=8, num_attention_heads=2, intermediate_size=20)
    layer = layer_activations(config, 0, recipe("bf16"), "none").total_bytes
    plan = TrainingPlan(recipe=recipe("bf16"), sequence_tokens=10, recompute="none")

    def activations(split: Split) -> int:
        return training_memory(config, replace(plan, split=split)).activations

    assert activations(Split(pipeline=4)) == 10 * layer * 2 * 4  # two layers a stage, four micro-batches
    assert activations(Split(pipeline=4, schedule="dualpipe")) == 10 * layer * 2 * 5
    assert activations(Split()) == 10 * layer * 8


def test_a_chunked_loss_saves_the_array_of_logits() -> None:
    plan = TrainingPlan(recipe=recipe("bf16"), loss_chunk_tokens=1024)
    config = v2_lite()
    chunked, whole = training_memory(config, plan), training_memory(config, replace(plan, loss_chunk_tokens=None))
    assert chunked.logits == 1024 * 102400 * 4 + 4096 * 2 * 2048 * 2
    assert whole.logits == 4096 * 102400 * (2 + 4) + 4096 * 2 * 2048 * 2


def test_sharing_everything_leaves_a_share_and_the_layers_at_work() -> None:
    config = v2_lite()
    counts, plan = parameter_counts(config), TrainingPlan(recipe=recipe("bf16"), split=Split(data=8, shard="all"))
    memory = training_memory(config, plan)
    assert memory.weights == pytest.approx(2 * counts.stored / 8, abs=2)
    layer = layer_parameters(config, 5).total
    assert memory.gathered == 2 * (2 * layer + counts.embedding + counts.head)


@pytest.mark.parametrize("make", [demo, mini, v2_lite, v2, v3])
@pytest.mark.parametrize("name", ["bf16", "deepseek_fp8"])
def test_half_the_devices_of_the_smallest_split_hold_the_model_in_no_way(make: Any, name: str) -> None:
    config, card = make(), device("h800")
    plan = smallest_split(config, card, TrainingPlan(recipe=recipe(name)))
    assert plan is not None
    assert fits(training_memory(config, plan).total_bytes, card).fits
    half = plan.split.num_devices // 2
    if half:
        assert smallest_split(config, card, plan, max_devices=half) is None


def test_the_smallest_split_agrees_with_trying_every_one() -> None:
    config, card, plan = v2_lite(), device("rtx4090"), TrainingPlan(recipe=recipe("bf16"), recompute="full")
    found = smallest_split(config, card, plan)
    assert found is not None
    powers = [2**power for power in range(8)]
    splits = [
        Split(data=data, expert=expert, pipeline=pipeline)
        for data in powers
        for expert in powers
        for pipeline in powers
        if data % expert == 0 and expert <= 64 and pipeline <= 27
    ]
    held = [one for one in splits if fits(training_memory(config, replace(plan, split=one)).total_bytes, card).fits]
    best = min(held, key=lambda one: (one.num_devices, one.pipeline, one.expert))
    assert found.split == best


def test_nothing_fits_where_activations_alone_are_too_many() -> None:
    card = parse_fit("2 cores, 1 GiB").device
    plan = TrainingPlan(recipe=recipe("bf16"))
    assert smallest_split(v3(), card, plan) is None
    assert largest_micro_batch(v3(), card, plan) == 0
    assert largest_sequence(v3(), card, plan) == 0


def test_the_largest_batch_and_row_fit_and_one_more_does_not() -> None:
    config, machine = mini(), parse_fit("2 cores, 24 GiB").device
    plan = TrainingPlan(recipe=recipe("cpu"), recompute="none", sequence_tokens=512)
    batch, row = largest_micro_batch(config, machine, plan), largest_sequence(config, machine, plan)
    for changes, fit in (
        ({"micro_batch": batch}, True),
        ({"micro_batch": batch + 1}, False),
        ({"sequence_tokens": row}, True),
        ({"sequence_tokens": row + 1}, False),
    ):
        needed = training_memory(config, replace(plan, **changes)).total_bytes  # type: ignore[arg-type]
        assert fits(needed, machine).fits is fit


@given(st.integers(0, 5000), st.integers(1, 5000))
def test_the_largest_that_fits_is_found_by_halving(limit: int, most: int) -> None:
    assert largest(lambda value: value <= limit, most) == min(limit, most)


def test_a_fit_says_how_much_is_free_or_missing() -> None:
    card = device("h800")
    fit = fits(60 * GIB, card, reserve_fraction=0.1)
    assert fit.fits
    assert fit.free_bytes == 80 * GIB - 8 * GIB - 60 * GIB
    assert fits(73 * GIB, card).free_bytes == -1 * GIB
    with pytest.raises(ConfigError, match="reserve_fraction=1"):
        fits(1, card, reserve_fraction=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch": 0}, "micro_batch=0 must be a whole number"),
        ({"micro_batch": 1.5}, "micro_batch=1.5 must be a whole number"),
        ({"sequence_tokens": -4}, "sequence_tokens=-4"),
        ({"loss_chunk_tokens": 0}, "loss_chunk_tokens=0"),
        ({"recompute": "selektive"}, "did you mean 'selective'"),
    ],
)
def test_plans_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingPlan(recipe=recipe("bf16"), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": 0}, "data=0"),
        ({"data": 6, "expert": 4}, "expert=4 does not divide data=6"),
        ({"pipeline": 3, "schedule": "dualpipe"}, "pipeline=3 is odd"),
        ({"shard": "zero3"}, "shard='zero3' is unknown"),
        ({"schedule": "gpipe"}, "schedule='gpipe' is unknown"),
    ],
)
def test_splits_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Split(**change)


def test_splits_must_suit_the_model() -> None:
    plan = TrainingPlan(recipe=recipe("bf16"), split=Split(pipeline=64))
    with pytest.raises(ConfigError, match="pipeline=64 stages for num_hidden_layers=61"):
        training_memory(v3(), plan)
    with pytest.raises(ConfigError, match="nothing to deal: use expert=1"):
        training_memory(v3().replace(n_routed_experts=None), replace(plan, split=Split(data=2, expert=2)))


def test_the_widest_search_answers_at_once() -> None:
    start = time.process_time()
    smallest_split(v3(), device("h800"), TrainingPlan(recipe=recipe("fp32")))
    smallest_split(v3(), device("h800"), TrainingPlan(recipe=recipe("deepseek_fp8")))
    assert time.process_time() - start < 0.2
