"""Properties of counts and plans that hold for every config, drawn at random; the real model on the meta device is the referee."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import ModelConfig
from shoal.model.transformer import Transformer
from shoal.planner.counts import (
    cache_bytes_per_token,
    decode_flops_per_token,
    parameter_counts,
    prefill_flops,
    training_flops_per_token,
)
from shoal.planner.plan.charts import training_flops_by_part
from shoal.planner.plan.question import ask
from shoal.planner.plan.settings import parse_settings
from shoal.planner.plan.whole import make_plan
from shoal.planner.rivals import fp8_checkpoint, rival_of

GROWING = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
GROWING_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
GROWING_EXPERTS = ("moe_intermediate_size", "n_shared_experts", "num_experts_per_tok", "n_routed_experts")


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any small model that can be built."""

    def whole(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    heads, is_moe, is_latent = 2 * whole(1, 4), draw(st.booleans()), draw(st.booleans())
    layers, mtp = whole(1, 5), whole(0, 2)
    values = {
        "vocab_size": whole(3, 400),
        "hidden_size": heads * 2 * whole(1, 20),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": whole(1, 200),
        "num_nextn_predict_layers": mtp,
        "tie_word_embeddings": draw(st.booleans()),
        "attention": "mla" if is_latent else "gqa",
        "num_key_value_heads": None if is_latent else draw(st.sampled_from([None, 1, 2, heads])),
        "q_lora_rank": draw(st.one_of(st.none(), st.integers(1, 60))),
        "kv_lora_rank": whole(1, 80),
        "qk_nope_head_dim": whole(1, 40),
        "qk_rope_head_dim": 2 * whole(1, 20),
        "v_head_dim": whole(1, 40),
    }
    if is_moe:
        groups = draw(st.sampled_from([1, 2, 4]))
        experts = groups * whole(2, 5)
        values |= {
            "n_routed_experts": experts,
            "n_group": groups,
            "topk_group": groups,
            "num_experts_per_tok": whole(1, experts),
            "n_shared_experts": whole(0, 2),
            "moe_intermediate_size": whole(1, 60),
            "first_k_dense_replace": whole(0, layers + mtp - 1),
            "topk_method": draw(st.sampled_from(["noaux_tc", "greedy"])),
        }
    return ModelConfig(**values)


@settings(max_examples=30, deadline=None)
@given(configs())
def test_counts_equal_the_real_models_and_parts_add_up(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    tensors = model.state_dict(keep_vars=True).values()
    stored = sum({id(tensor): tensor.numel() for tensor in tensors}.values())  # a tied table is one tensor
    counts = parameter_counts(config)
    assert counts.stored == stored
    assert counts.stored == sum(counts.by_part().values()) == counts.total + counts.mtp
    assert counts.active <= counts.total
    files = fp8_checkpoint(config)
    copies = config.num_nextn_predict_layers * 2 * config.vocab_size * config.hidden_size
    assert files.fp8_bytes + files.bf16_bytes // 2 + files.fp32_bytes // 4 == counts.stored + copies
    flops = training_flops_by_part(config, 64)
    assert abs(sum(flops.values()) / training_flops_per_token(config, 64) - 1) < 1e-12


@settings(max_examples=50, deadline=None)
@given(configs(), st.data())
def test_nothing_shrinks_when_a_dimension_grows(config: ModelConfig, data: st.DataObject) -> None:
    names = [*GROWING]
    if config.attention == "mla":
        names += [name for name in GROWING_LATENT if getattr(config, name) is not None]
    if config.n_routed_experts is not None:
        names += GROWING_EXPERTS
    name = data.draw(st.sampled_from(names))
    step = {"qk_rope_head_dim": 2, "n_routed_experts": config.n_group}.get(name, 1)
    if name == "num_attention_heads":
        step = config.num_attention_heads
    if name == "hidden_size" and config.attention == "gqa":
        step = 2 * config.num_attention_heads
    if name == "num_experts_per_tok" and config.num_experts_per_tok == config.n_routed_experts:
        return
    grown = config.replace(**{name: getattr(config, name) + step, **_kept(config, name)})
    for measure in (
        lambda one: parameter_counts(one).total,
        lambda one: parameter_counts(one).active,
        lambda one: parameter_counts(one).stored,
        cache_bytes_per_token,
        lambda one: training_flops_per_token(one, 64),
        lambda one: prefill_flops(one, 64),
        lambda one: decode_flops_per_token(one, 64),
        lambda one: fp8_checkpoint(one).total_bytes,
    ):
        assert measure(grown) >= measure(config), name
    has_dense_layers = config.n_routed_experts is None or config.first_k_dense_replace > 0
    if name != "num_experts_per_tok" and (name != "intermediate_size" or has_dense_layers):
        assert parameter_counts(grown).stored > parameter_counts(config).stored


def _kept(config: ModelConfig, name: str) -> dict[str, int | None]:
    """Grouped heads keep their width and their number when others come; otherwise more heads would be thinner ones."""
    if config.attention == "gqa" and name == "num_attention_heads":
        return {"head_dim": config.gqa_head_dim, "num_key_value_heads": config.kv_heads}
    return {}


@settings(max_examples=10, deadline=None)
@given(configs(), st.sampled_from(["tokens", "power_w", "price_usd_per_device_h", "pue", "kg_co2_per_kwh"]))
def test_a_plan_never_gets_cheaper_when_something_it_pays_for_grows(config: ModelConfig, key: str) -> None:
    model = rival_of("random", config, source="test")

    def costs(factor: float) -> dict[str, float]:
        base = {"tokens": 1e9, "power_w": 500, "price_usd_per_device_h": 2, "pue": 1.2, "kg_co2_per_kwh": 0.4}
        base[key] *= factor
        figures = make_plan(
            ask(model, None, parse_settings([f"{name}={value}" for name, value in base.items()]))
        ).figures
        return {
            name: float(one.value)
            for name, one in figures.items()
            if name.startswith("training_") and isinstance(one.value, float)
        }

    before, after = costs(1.0), costs(1.5)
    assert set(before) == set(after) and all(after[name] >= before[name] for name in before)
