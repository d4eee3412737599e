import json
from typing import Any

import pytest
import torch

from shoal.checkpoint.hf_config import config_from_hf, config_to_hf, published_family
from shoal.config import ModelConfig, YarnConfig
from shoal.errors import ConfigError

R1: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2_LITE: dict[str, Any] = {
    **{key: value for key, value in R1.items() if key not in ("quantization_config", "num_nextn_predict_layers")},
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
}


def test_the_published_r1_config_is_read_key_by_key() -> None:
    config = config_from_hf(R1)
    for name in ModelConfig.__dataclass_fields__:
        if name in R1 and name not in ("rope_scaling", "num_key_value_heads"):
            assert getattr(config, name) == R1[name], name
    assert config.rope_scaling == YarnConfig(
        factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0
    )
    assert config.cache_width == 576


def test_v2_lite_has_no_query_compression_and_routes_by_softmax() -> None:
    config = config_from_hf(V2_LITE)
    assert (config.q_lora_rank, config.scoring_func, config.topk_method) == (None, "softmax", "greedy")
    assert (config.norm_topk_prob, config.n_shared_experts, config.num_nextn_predict_layers) == (False, 2, 0)


def test_routing_keys_that_transformers_leaves_out_follow_from_the_family() -> None:
    short = {key: value for key, value in R1.items() if key not in ("scoring_func", "topk_method")}
    assert config_from_hf(short) == config_from_hf(R1)


def test_the_spelling_of_transformers_5_means_the_same() -> None:
    old = {key: value for key, value in R1.items() if key not in ("rope_scaling", "rope_theta")}
    scaling = {key: value for key, value in R1["rope_scaling"].items() if key != "type"}
    new = {**old, "rope_parameters": {**scaling, "rope_type": "yarn", "rope_theta": 10000}}
    new["num_mtp_layers"] = new.pop("num_nextn_predict_layers")
    assert config_from_hf(new) == config_from_hf(R1)
    plain = config_from_hf({**old, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}})
    assert (plain.rope_theta, plain.rope_scaling) == (77.0, None)


def test_kimi_is_read_as_the_v3_that_it_is() -> None:
    assert config_from_hf({**R1, "model_type": "kimi_k2"}) == config_from_hf(R1)


def test_llama_becomes_the_dense_grouped_baseline() -> None:
    config = config_from_hf(LLAMA)
    assert (config.attention, config.kv_heads, config.gqa_head_dim, config.n_routed_experts) == ("gqa", 2, 16, None)
    assert (config.bos_token_id, config.eos_token_id, config.rope_theta) == (1, 2, 500000.0)


SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
EXPERTS: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SOFTMAX: dict[str, Any] = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("deepseek_v3", ModelConfig(**SMALL, **EXPERTS, q_lora_rank=8, num_nextn_predict_layers=1)),
        ("deepseek_v3", ModelConfig(**SMALL)),
        ("deepseek_v3", ModelConfig(**SMALL, num_nextn_predict_layers=1, tie_word_embeddings=True)),
        ("deepseek_v2", ModelConfig(**SMALL, **EXPERTS, **SOFTMAX)),
        ("deepseek_v3", ModelConfig(**SMALL, rope_scaling=YarnConfig(factor=4, original_max_position_embeddings=64))),
        ("llama", ModelConfig(**SMALL, attention="gqa", num_key_value_heads=2, head_dim=6)),
        ("glm4_moe", ModelConfig(**SMALL, **EXPERTS, attention="gqa", num_key_value_heads=2, head_dim=6)),
        ("shoal", ModelConfig(**SMALL, **EXPERTS, **SOFTMAX, attention="gqa", num_key_value_heads=2)),
        ("shoal", ModelConfig(**SMALL, **EXPERTS, **{**SOFTMAX, "norm_topk_prob": True})),
        ("shoal", ModelConfig(**SMALL, **EXPERTS, scoring_func="softmax")),
        (
            "shoal",
            ModelConfig(
                **SMALL,
                **EXPERTS,
                topk_method="greedy",
                rope_scaling=YarnConfig(factor=4, original_max_position_embeddings=64),
            ),
        ),
    ],
)
def test_every_config_survives_the_way_out_and_back(family: str, config: ModelConfig) -> None:
    written = json.loads(json.dumps(config_to_hf(config)))
    assert written["model_type"] == family
    assert (published_family(config)[1] is None) == (family != "shoal")
    assert config_from_hf(written) == config


def test_what_is_written_is_complete_in_the_old_spelling() -> None:
    written = config_to_hf(config_from_hf(R1), dtype=torch.float32)
    unimportant = {"aux_loss_alpha", "ep_size", "quantization_config", "torch_dtype"}
    assert {key: written[key] for key in R1 if key not in unimportant} == {
        key: value for key, value in R1.items() if key not in unimportant
    }
    assert written["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; supported: deepseek_v3"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"scoring_func": "sqrtsoftplus"}, "scoring_func='sqrtsoftplus'"),
        ({"topk_method": "hash"}, "topk_method='hash'"),
        ({"kv_lora_rank": None}, "lacks kv_lora_rank"),
        ({"hidden_size": "7168"}, "hidden_size='7168'"),
        ({"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers='one'"),
        ({"rope_theta": "big"}, "rope_theta='big'"),
        ({"rope_scaling": ["yarn"]}, "rope_scaling"),
        ({"quantization_config": "fp8"}, "quantization_config"),
        ({"hidden_size": 7168.5}, "must be of type int"),
        ({"n_group": "eight"}, "n_group='eight' is of type str"),
        ({"n_group": 7}, "n_routed_experts=256 is not divisible by n_group=7"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4096}}, r"lacks rope_scaling\.factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}, "weight_block_size=None"),
        ({"model_type": "deepseek_v2"}, "norm_topk_prob=true"),
        ({"model_type": "glm4_moe"}, "partial_rotary_factor=0.5"),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_hf({**R1, **change})


@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "q_lora_rank", "num_experts_per_tok"])
def test_a_missing_key_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"lacks {name}"):
        config_from_hf({key: value for key, value in R1.items() if key != name})
