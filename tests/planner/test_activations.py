"""Activations in closed form, held against what our own model really saves for backward, and against V3's figures."""

from typing import Any
from unittest import mock

import pytest
import torch

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.kernels import products
from shoal.model.experts import Experts
from shoal.model.layers import Linear
from shoal.model.transformer import Transformer, initialise
from shoal.planner.activations import RECIPES, Recompute, layer_activations, recipe
from shoal.planner.memory import layer_parameters
from shoal.presets import v2_lite, v3

SHAPES: dict[str, dict[str, Any]] = {
    "experts": {},
    "dense": {"n_routed_experts": None},
    "grouped": {"attention": "gqa", "num_key_value_heads": 1, "n_routed_experts": None},
    "no query latent": {"q_lora_rank": None},
}


def _model(layers: int, **changes: Any) -> ModelConfig:
    base = ModelConfig(
        vocab_size=64,
        hidden_size=96,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=160,
        q_lora_rank=40,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=24,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=64,
        first_k_dense_replace=0,
    )
    return base.replace(**changes)


def _saved_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype | None) -> tuple[int, int]:
    """Bytes that autograd holds after a forward pass: activations, and copies of weights in the dtype of the products."""
    model = Transformer(config)
    initialise(model, seed=3)
    for module in model.modules():
        if isinstance(module, Linear | Experts):
            module.compute_dtype = dtype
    owned = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    shapes = {shape for one in model.parameters() for shape in (tuple(one.shape), (1, *one.shape))}
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    panels: list[int] = []
    real_pack = products._pack

    def recording(*arguments: Any, **options: Any) -> Any:
        forward, backward = real_pack(*arguments, **options)
        panels.append(0 if backward is None else backward.nbytes)  # kept for backward outside of autograd's sight
        return forward, backward

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with mock.patch.object(products, "_pack", recording), hooks:
        model(torch.arange(tokens).remainder(config.vocab_size).unsqueeze(0))
    sizes = [(tuple(one.shape) in shapes, one.untyped_storage().nbytes()) for one in held.values()]
    return sum(size for copy, size in sizes if not copy), sum(size for copy, size in sizes if copy) + sum(panels)


def _one_layer(shape: str, tokens: int, dtype: torch.dtype | None) -> tuple[int, int]:
    """What the third layer adds."""
    two, three = (_saved_bytes(_model(layers, **SHAPES[shape]), tokens, dtype) for layers in (2, 3))
    return three[0] - two[0], three[1] - two[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_activations_are_within_a_tenth_of_what_the_model_saves(shape: str) -> None:
    tokens = 117  # no dimension of a weight, by whose shape copies are told from activations
    real, copies = _one_layer(shape, tokens, None)
    ours = layer_activations(_model(3, **SHAPES[shape]), 2, recipe("fp32"), "none").total_bytes
    assert copies == 0
    assert tokens * ours == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_activations_are_within_a_fifth_and_weight_copies_exact(shape: str) -> None:
    tokens = 1024  # enough for the padding of experts' blocks to matter little
    real, copies = _one_layer(shape, tokens, torch.bfloat16)
    config = _model(3, **SHAPES[shape])
    # Where these kernels do not pay, PyTorch's path keeps copies that they do not.
    within = 0.2 if products._pays() else 0.4
    assert tokens * layer_activations(config, 2, recipe("cpu"), "none").total_bytes == pytest.approx(real, rel=within)
    held = layer_parameters(config, 2)
    assert copies == 2 * (held.experts + held.matrices)


def test_v3_keeps_latents_27_times_smaller_than_what_they_expand_to() -> None:
    # 1536 + 512 + 64 numbers against 24,576 of the queries' and 32,768 of the keys' and values' up-projection, in bf16.
    kept = layer_activations(v3(), 10, recipe("bf16"), "selective")
    assert kept.latents == 4224
    assert kept.heads == 0
    assert (24576 + 32768) * 2 / kept.latents == pytest.approx(27.15, abs=0.01)


def test_hand_counted_parts_of_a_v3_layer_in_bf16() -> None:
    parts = layer_activations(v3(), 10, recipe("bf16"), "none").by_part()
    assert parts == {
        "residual": 4 * 7168 * 2,  # two inputs of norms, two of linear maps
        "latents": (2 * (1536 + 512) + 64) * 2,
        "heads": 128 * (192 + 192 + 128) * 2,
        "attention_output": 128 * 128 * 2 + 128 * 4,
        "routing": 256 * 4 + 2 * 8 * 7168 * 2,
        "feed_forward": 9 * 2048 * 3 * 2,
    }


def test_full_recomputation_keeps_the_layers_input_only() -> None:
    for layer in (0, 10):
        assert layer_activations(v3(), layer, recipe("bf16"), "full").by_part() == {
            "residual": 2 * 7168,
            "latents": 0,
            "heads": 0,
            "attention_output": 0,
            "routing": 0,
            "feed_forward": 0,
        }


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("layer", [0, 5])
def test_recomputing_more_keeps_less(name: str, layer: int) -> None:
    modes: tuple[Recompute, ...] = ("none", "selective", "full")
    for config in (v3(), v2_lite()):
        none, selective, full = (layer_activations(config, layer, recipe(name), mode).total_bytes for mode in modes)
        assert none > selective > full > 0


def test_v3_saves_four_bytes_of_sixteen_by_bf16_moments() -> None:
    deepseek, usual = recipe("deepseek_fp8"), recipe("bf16")
    assert deepseek.master_bytes + deepseek.gradient_bytes + deepseek.matrix_moment_bytes == 12
    assert usual.master_bytes + usual.gradient_bytes + usual.matrix_moment_bytes == 16


def test_an_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'bf16'.*recipes are fp32, cpu, bf16, muon, deepseek_fp8"):
        recipe("bf61")
