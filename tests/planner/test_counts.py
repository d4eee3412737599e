"""Published figures, reproduced from the configs alone. Sources: DeepSeek-V2 and V3 reports, ISCA 2025 paper."""

import random
from typing import Any

import pytest
import torch

from shoal.config import ModelConfig
from shoal.model.transformer import Transformer
from shoal.planner.counts import (
    attention_parameters,
    cache_bytes_per_token,
    cache_elements_per_token,
    decode_flops_per_token,
    default_gqa_groups,
    expert_parameters,
    gqa_cache_bytes_per_token,
    mha_cache_bytes_per_token,
    parameter_counts,
    prefill_flops,
    training_flops_per_token,
)

V2_LITE = ModelConfig(
    vocab_size=102400,
    hidden_size=2048,
    num_hidden_layers=27,
    num_attention_heads=16,
    intermediate_size=10944,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
    scoring_func="softmax",
    topk_method="greedy",
)
V2 = ModelConfig(
    vocab_size=102400,
    hidden_size=5120,
    num_hidden_layers=60,
    num_attention_heads=128,
    intermediate_size=12288,
    q_lora_rank=1536,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1536,
    n_group=8,
    topk_group=3,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
)
V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    intermediate_size=18432,
    q_lora_rank=1536,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    first_k_dense_replace=3,
    n_group=8,
    topk_group=4,
    num_nextn_predict_layers=1,
)


@pytest.mark.parametrize(
    ("config", "attention", "expert", "total", "active"),
    [
        (V2_LITE, 13_763_072, 8_650_752, 15_706_484_224, 2_451_435_008),
        (V2, 149_227_520, 23_592_960, 235_741_434_880, 20_851_512_320),
        (V3, 187_107_328, 44_040_192, 671_026_419_200, 36_625_618_432),
    ],
)
def test_published_sizes_are_reproduced_exactly(
    config: ModelConfig, attention: int, expert: int, total: int, active: int
) -> None:
    counts = parameter_counts(config)
    assert attention_parameters(config) == attention
    assert expert_parameters(config) == expert
    assert counts.total == total
    assert counts.active == active


def test_v3_checkpoint_elements_are_model_mtp_module_and_two_more_embedding_tables() -> None:
    counts = parameter_counts(V3)
    assert counts.mtp == 11_610_068_224
    assert counts.embedding == counts.head == 926_679_040
    # The published files repeat embedding and head inside the MTP layer.
    assert counts.stored + counts.embedding + counts.head == 684_489_845_504


def test_active_part_of_the_mtp_module_is_the_published_2_4_billion() -> None:
    eh_proj = 2 * 7168 * 7168
    assert (parameter_counts(V3).mtp_active - eh_proj + 2 * 926_679_040) / 1e9 == pytest.approx(2.44, abs=0.005)


def test_parts_add_up_and_tied_embeddings_are_counted_once() -> None:
    counts = parameter_counts(V3)
    assert sum(counts.by_part().values()) == counts.stored == counts.total + counts.mtp
    tied = parameter_counts(V3.replace(tie_word_embeddings=True))
    assert tied.head == 0
    assert counts.total - tied.total == 129280 * 7168
    assert tied.active == counts.active  # the table is multiplied as head either way


def test_cache_matches_the_published_bytes() -> None:
    assert cache_elements_per_token(V2_LITE) == 15_552
    assert cache_elements_per_token(V2) == 34_560
    assert cache_bytes_per_token(V3) == 70_272
    qwen = ModelConfig(  # Qwen2.5-72B and LLaMA-3.1-405B, ISCA 2025 table 1
        vocab_size=1000,
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        intermediate_size=8,
        attention="gqa",
        num_key_value_heads=8,
    )
    llama = qwen.replace(hidden_size=16384, num_hidden_layers=126, num_attention_heads=128)
    assert cache_bytes_per_token(qwen) == 327_680
    assert cache_bytes_per_token(llama) == 516_096


def test_mla_is_to_mha_and_gqa_as_published() -> None:
    # DeepSeek-V2 table 9: the small MHA model caches 110.6K elements against 15.6K; table 1: 2.25 groups.
    assert mha_cache_bytes_per_token(V2_LITE, bytes_per_element=1) == 110_592
    assert cache_bytes_per_token(V2_LITE) / mha_cache_bytes_per_token(V2_LITE) == pytest.approx(0.140625)
    one_group = gqa_cache_bytes_per_token(V2, num_groups=1)
    assert cache_bytes_per_token(V2) / one_group == 2.25
    assert gqa_cache_bytes_per_token(V3) == 2 * 8 * 128 * 61 * 2


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 4), (12, 6), (16, 8), (128, 8)])
def test_default_groups_divide_the_heads_and_share_each_at_least_twice(heads: int, groups: int) -> None:
    assert default_gqa_groups(V2_LITE.replace(num_attention_heads=heads)) == groups


@pytest.mark.parametrize(
    ("config", "causal", "gigaflops"),
    [(V2_LITE, True, 16.41), (V2, True, 155.31), (V3, True, 250.46), (V3, False, 281.16)],
)
def test_training_flops_are_the_published_ones(config: ModelConfig, causal: bool, gigaflops: float) -> None:
    assert training_flops_per_token(config, 4096, causal) / 1e9 == pytest.approx(gigaflops, abs=0.005)


def test_training_flops_per_day_give_the_published_utilisation() -> None:
    tokens_per_s_per_gpu = 272.80e9 / 86400 / 2048
    assert tokens_per_s_per_gpu * training_flops_per_token(V3, 4096) / 989.5e12 == pytest.approx(0.3894, abs=0.003)


def test_mtp_adds_its_layer_its_projection_and_a_second_pass_through_the_head() -> None:
    counts = parameter_counts(V3)
    extra = training_flops_per_token(V3, 4096, include_mtp=True) - training_flops_per_token(V3, 4096)
    attention = 3 * 2 * 128 * (192 + 128) * 2048
    assert extra == 6 * (counts.mtp_active + 129280 * 7168) + attention


def test_decoding_attends_to_latents_and_prefill_to_heads() -> None:
    # The core attention of V3.2 at its 2,048 chosen tokens: 34.8 GFLOPs.
    linear = 2 * parameter_counts(V3).active
    assert decode_flops_per_token(V3, 0) == linear
    assert (decode_flops_per_token(V3, 2048) - linear) / 1e9 == pytest.approx(34.8, abs=0.05)
    table, heads = 129280 * 7168, 2 * 128 * (192 + 128) * 61
    assert prefill_flops(V3, 10) == 10 * (linear - 2 * table + heads * 5) + 2 * table
    gqa = V3.replace(attention="gqa", head_dim=128)
    assert decode_flops_per_token(gqa, 7) - decode_flops_per_token(gqa, 0) == 4 * 128 * 128 * 7 * 61


@pytest.mark.parametrize("seed", range(6))
def test_counts_equal_the_parameters_of_the_built_model(seed: int) -> None:
    config = random_config(random.Random(seed))
    with torch.device("meta"):
        model = Transformer(config)
    counts = parameter_counts(config)
    numel = {name: parameter.numel() for name, parameter in model.named_parameters()}
    biases = {name: buffer.numel() for name, buffer in model.named_buffers() if name.endswith("correction_bias")}
    assert sum(numel.values()) + sum(biases.values()) == counts.stored
    ahead = {name: size for name, size in (numel | biases).items() if name.startswith("mtp.")}
    assert sum(ahead.values()) == counts.mtp
    attention = sum(size for name, size in numel.items() if ".self_attn." in name and name.startswith("layers."))
    assert attention == counts.attention


def random_config(choose: random.Random) -> ModelConfig:
    """A small config with sizes that are all different, any attention, any router, with and without MTP."""
    heads = choose.choice([2, 4, 6])
    values: dict[str, Any] = {
        "vocab_size": choose.randint(50, 90),
        "hidden_size": heads * choose.choice([8, 10]),
        "num_hidden_layers": choose.randint(2, 4),
        "num_attention_heads": heads,
        "intermediate_size": choose.randint(30, 47),
        "attention": choose.choice(["mla", "gqa"]),
        "num_key_value_heads": choose.choice([None, 2]),
        "q_lora_rank": choose.choice([None, 13]),
        "kv_lora_rank": 11,
        "qk_nope_head_dim": 7,
        "qk_rope_head_dim": 6,
        "v_head_dim": 9,
        "num_nextn_predict_layers": choose.randint(0, 2),
        "tie_word_embeddings": choose.random() < 0.5,
    }
    if choose.random() < 0.7:
        values |= {
            "n_routed_experts": 8,
            "n_shared_experts": choose.randint(0, 2),
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 17,
            "first_k_dense_replace": choose.randint(0, 2),
            "topk_method": choose.choice(["noaux_tc", "greedy"]),
        }
    return ModelConfig(**values)
