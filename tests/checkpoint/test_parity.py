"""Our numbers against transformers', both ways, on CPU in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.checkpoint.convert import convert
from shoal.checkpoint.hf_format import load_model, save_model
from shoal.checkpoint.quantised import Scheme
from shoal.checkpoint.weight_files import WeightFiles
from shoal.config import ModelConfig, YarnConfig
from shoal.model.layers import set_fp8
from shoal.model.transformer import Transformer, initialise
from shoal.quant.fp8_recipe import Fp8Recipe

transformers = pytest.importorskip("transformers")

EXPERTS = "eager"
"""Their grouped matrix product wants rows of a multiple of 16 bytes, which sizes this odd do not have."""

V3: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 11,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 64,
    "num_mtp_layers": 0,
}
V2: dict[str, Any] = {
    **{key: value for key, value in V3.items() if key != "num_mtp_layers"},
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.7,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
GQA: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
GLM: dict[str, Any] = {
    **GQA,
    "moe_intermediate_size": 11,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "partial_rotary_factor": 1.0,
    "num_mtp_layers": 0,
}

THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3 without query compression": ("DeepseekV3", V3),
    "v3 with query compression and groups": ("DeepseekV3", {**V3, "q_lora_rank": 14, "n_group": 4, "topk_group": 2}),
    "v3 with yarn": ("DeepseekV3", {**V3, "q_lora_rank": 14, "rope_parameters": YARN}),
    "v3 without renormalisation": ("DeepseekV3", {**V3, "norm_topk_prob": False}),
    "v3 with tied embeddings": ("DeepseekV3", {**V3, "tie_word_embeddings": True}),
    "v3 with another norm epsilon": ("DeepseekV3", {**V3, "q_lora_rank": 14, "rms_norm_eps": 1e-2}),
    "v2 greedy": ("DeepseekV2", V2),
    "v2 by groups with query compression": (
        "DeepseekV2",
        {**V2, "q_lora_rank": 14, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "v2 with yarn": ("DeepseekV2", {**V2, "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    "llama": ("Llama", GQA),
    "llama with yarn": ("Llama", {**GQA, "rope_parameters": YARN}),
    "glm": ("Glm4Moe", GLM),
}

MLA_SHAPE: dict[str, Any] = {
    "vocab_size": 47,
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": 64,
    "kv_lora_rank": 9,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
}
MOE_SHAPE: dict[str, Any] = {"n_routed_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 13}
V2_ROUTING: dict[str, Any] = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
GQA_SHAPE: dict[str, Any] = {**MLA_SHAPE, "attention": "gqa", "num_key_value_heads": 1, "num_attention_heads": 2}

OURS: dict[str, tuple[str, ModelConfig]] = {
    "sigmoid routing": (
        "deepseek_v3",
        ModelConfig(**MLA_SHAPE, **MOE_SHAPE, q_lora_rank=11, n_group=5, topk_group=3, routed_scaling_factor=1.5),
    ),
    "with prediction layers": ("deepseek_v3", ModelConfig(**MLA_SHAPE, **MOE_SHAPE, num_nextn_predict_layers=2)),
    "dense latent attention": ("deepseek_v3", ModelConfig(**MLA_SHAPE, tie_word_embeddings=True)),
    # transformers' V2 cannot rotate what stands beside something of odd width.
    "softmax routing": (
        "deepseek_v2",
        ModelConfig(**{**MLA_SHAPE, "qk_nope_head_dim": 10, "kv_lora_rank": 12}, **MOE_SHAPE, **V2_ROUTING),
    ),
    "yarn": (
        "deepseek_v3",
        ModelConfig(
            **MLA_SHAPE,
            **MOE_SHAPE,
            rope_scaling=YarnConfig(factor=4, original_max_position_embeddings=16, mscale_all_dim=1),
        ),
    ),
    "dense grouped attention": ("llama", ModelConfig(**GQA_SHAPE, rope_theta=500.0)),
    "grouped attention with experts": ("glm4_moe", ModelConfig(**GQA_SHAPE, **MOE_SHAPE, n_shared_experts=2)),
    "dense grouped attention with a prediction layer": (
        "glm4_moe",
        ModelConfig(**GQA_SHAPE, num_nextn_predict_layers=1),
    ),
}


def make_random(module: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every part matters; norms away from one, balance biases away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor.data.copy_(1 + 0.3 * noise)
        elif name.endswith("e_score_correction_bias"):
            tensor.data.copy_(0.3 * noise)
        elif "rotary" not in name and "rotation" not in name:
            tensor.data.copy_(noise * tensor.shape[-1] ** -0.5)


def tokens(vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (2, 39), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def our_logits(model: Transformer, token_BS: Tensor) -> Tensor:
    model.eval()
    return model.logits(model(token_BS))


def build(directory: Path) -> Transformer:
    config, state = load_model(directory)
    model = Transformer(config)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_a_model_saved_by_transformers_gives_the_same_logits_here(tmp_path: Path, name: str) -> None:
    family, values = THEIRS[name]
    theirs = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{family}Config")(**values), experts_implementation=EXPERTS
    ).eval()
    make_random(theirs, seed=1)
    theirs.save_pretrained(tmp_path)
    token_BS = tokens(values["vocab_size"])
    wanted = theirs(token_BS).logits
    assert wanted.std() > 0.3
    torch.testing.assert_close(our_logits(build(tmp_path), token_BS), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_a_model_saved_here_gives_the_same_logits_in_transformers(tmp_path: Path, name: str) -> None:
    family, config = OURS[name]
    ours = Transformer(config)
    make_random(ours, seed=3)
    save_model(tmp_path / "model", config, ours.state_dict(), dtype=torch.float32)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, dtype=torch.float32, experts_implementation=EXPERTS
    )
    assert theirs.config.model_type == family
    assert not report["missing_keys"] and not report["mismatched_keys"]
    depth = tuple(f"model.layers.{config.num_hidden_layers + k}." for k in range(config.num_nextn_predict_layers))
    assert all(key.startswith(depth) for key in report["unexpected_keys"])
    token_BS = tokens(config.vocab_size)
    torch.testing.assert_close(our_logits(ours, token_BS), theirs.eval()(token_BS).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_prediction_layers_give_what_the_transformers_drafter_computes(tmp_path: Path) -> None:
    from transformers.modeling_layers import MtpModel

    _, config = OURS["with prediction layers"]
    config = config.replace(num_nextn_predict_layers=1)
    ours = Transformer(config)
    make_random(ours, seed=4)
    save_model(tmp_path / "model", config, ours.state_dict(), dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, experts_implementation=EXPERTS
    ).eval()
    # transformers finds prediction layers by a pattern that is fixed to V3's own 61 layers.
    theirs._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3.*"]
    drafter = MtpModel.from_pretrained(theirs).eval()
    token_BS = tokens(config.vocab_size)[:1]
    hidden_BSD = ours.eval()(token_BS)
    (head_BSD,) = ours.predict_ahead(hidden_BSD, token_BS)
    length = token_BS.shape[1] - 1
    position_BS = torch.arange(length).unsqueeze(0)
    theirs_BSD = drafter.forward_layer(
        0, theirs.model(token_BS).last_hidden_state[:, :-1], position_BS, None, input_ids=token_BS[:, 1:]
    )
    torch.testing.assert_close(head_BSD[:, :length], theirs_BSD, atol=1e-4, rtol=0)


FP8_CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=384,
    q_lora_rank=128,
    kv_lora_rank=96,  # with the rotary key 128 rows: transformers takes blocks that are cut off for smaller whole ones
    qk_nope_head_dim=96,
    qk_rope_head_dim=32,
    v_head_dim=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    initializer_range=0.1,
)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_an_fp8_directory_opens_in_the_block_fp8_loader_of_transformers_with_the_same_logits(tmp_path, power_of_two):
    """Its FP8 products need a GPU; on the CPU the loader multiplies the blocks out itself (`dequantize=True`).

    The model has taken a few steps with FP8 products, as a trained one has.
    """
    model = Transformer(FP8_CONFIG)
    initialise(model, 2)
    set_fp8(model, Fp8Recipe(power_of_two="everywhere" if power_of_two else "published"))
    token_BS = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(model.logits(model(token_BS)).flatten(0, 1), token_BS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(tmp_path / "model", FP8_CONFIG, model.state_dict(), dtype=torch.float32)
    scheme = Scheme(weights="fp8", power_of_two=power_of_two)
    convert(tmp_path / "model", tmp_path / "fp8", FP8_CONFIG, scheme, command="")
    _, state = load_model(tmp_path / "fp8", dtype=torch.float32)
    ours = Transformer(FP8_CONFIG).eval()
    ours.load_state_dict(state)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8",
        dtype=torch.float32,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    ).eval()
    with torch.no_grad():
        found, expected = theirs(token_BS).logits, ours.logits(ours(token_BS))
    # Shoal reads FP8 into bfloat16; transformers multiplies out in float32.
    assert float((found - expected).norm() / expected.norm()) < 0.01
    stored = WeightFiles(tmp_path / "fp8")
    for name, parameter in theirs.named_parameters():
        if name.endswith("o_proj.weight"):
            assert torch.equal(parameter.bfloat16(), stored.tensor(name)), name
