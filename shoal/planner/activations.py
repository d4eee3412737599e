"""What training keeps: bytes per number by recipe, and the activations of one layer per token, in closed form.

A recipe says in what format weights, gradients, optimizer states and activations are held. DeepSeek-V3 keeps both Adam
moments in bf16: 12 bytes of states per parameter instead of 16 (§3.3.3).

Activations are what backward needs of a latent attention and a mixture of experts whose tokens are dealt evenly:

- *none* keeps what textbook backward needs;
- *selective* keeps what V3 §3.2.3 and §3.3.3 keep: norms, up-projections of the latents and SwiGLU products are computed
  again, so of queries, keys and values only the latents remain (2,112 numbers instead of 57,344 at V3's shape);
- *full* keeps the input of every layer.

Softmax attention itself is fused: its scores never exist. Gate weights multiply the SwiGLU product where it is recomputed,
so the experts' answers need not be kept.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from shoal.config import ModelConfig
from shoal.errors import ConfigError, did_you_mean

Recompute = Literal["none", "selective", "full"]

FP8_SCALE_BYTES = 4 / 128**2
"""A float32 for each block of 128 by 128 weights, per weight."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Bytes per number of everything a training run keeps."""

    name: str
    matrix_weight_bytes: float
    """Attention, feed-forward layers and experts, in the format of their products."""
    other_weight_bytes: float
    """Embedding, head, router, norms, the joint of an MTP module."""
    master_bytes: float
    """Of the full-precision copy that the optimizer moves; 0 where the weights are that."""
    gradient_bytes: float
    matrix_moment_bytes: float
    """All moments of one number in a matrix."""
    other_moment_bytes: float
    activation_bytes: float
    """Residual stream, latents, heads."""
    linear_input_bytes: float
    """What a linear map keeps of its input."""
    attention_output_bytes: float
    """Kept for attention and for the projection after it."""
    product_bytes: float
    """What a feed-forward layer keeps of its products' results: gate, up, answers of experts."""
    kept_of_networks: Literal["all", "gate_up", "fused"] = "all"
    """Of SwiGLU networks: gate, up and their product; the first two, the product being made again; or where one kernel runs
    the whole network also no copies of the tokens that experts get, nor their answers."""
    repeats_kv_heads: bool = False
    """Whether grouped keys and values are kept once for every query head, as Shoal's own attention does."""
    source: str


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """Bytes that one layer keeps per token until its backward."""

    residual: int
    """Inputs of the two norms, and what the linear maps behind them keep."""
    latents: int
    heads: int
    """Queries, keys and values."""
    attention_output: int
    """With the logarithm of the softmax sum, one float32 per head."""
    routing: int
    """Scores, copies dispatched to experts, and their answers."""
    feed_forward: int

    @property
    def total_bytes(self) -> int:
        """All parts."""
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, int]:
        """The disjoint parts."""
        return dict(vars(self))


RECIPES: dict[str, Recipe] = {
    one.name: one
    for one in (
        Recipe(
            name="fp32",
            matrix_weight_bytes=4,
            other_weight_bytes=4,
            master_bytes=0,
            gradient_bytes=4,
            matrix_moment_bytes=8,
            other_moment_bytes=8,
            activation_bytes=4,
            linear_input_bytes=4,
            attention_output_bytes=4,
            product_bytes=4,
            kept_of_networks="gate_up",
            repeats_kv_heads=True,
            source="everything in float32, AdamW: 16 bytes per parameter",
        ),
        Recipe(
            name="cpu",
            matrix_weight_bytes=6,
            other_weight_bytes=4,
            master_bytes=0,
            gradient_bytes=4,
            matrix_moment_bytes=8,
            other_moment_bytes=8,
            activation_bytes=4,
            linear_input_bytes=2,
            attention_output_bytes=6,
            product_bytes=2,
            kept_of_networks="fused",
            repeats_kv_heads=True,
            source="Shoal's own on CPUs: float32 AdamW with products in bf16, whose weights backward keeps beside the float32 ones "
            "(shoal/kernels/products.py); tests hold it within a fifth of the real model",
        ),
        Recipe(
            name="bf16",
            matrix_weight_bytes=2,
            other_weight_bytes=2,
            master_bytes=4,
            gradient_bytes=4,
            matrix_moment_bytes=8,
            other_moment_bytes=8,
            activation_bytes=2,
            linear_input_bytes=2,
            attention_output_bytes=2,
            product_bytes=2,
            source="mixed precision (Micikevicius et al. 2018) in bf16, float32 master weights, gradients and AdamW: 2 + 16",
        ),
        Recipe(
            name="muon",
            matrix_weight_bytes=2,
            other_weight_bytes=2,
            master_bytes=4,
            gradient_bytes=4,
            matrix_moment_bytes=4,
            other_moment_bytes=8,
            activation_bytes=2,
            linear_input_bytes=2,
            attention_output_bytes=2,
            product_bytes=2,
            source="as bf16, with Muon's single float32 momentum for matrices and AdamW for the rest (arXiv 2502.16982)",
        ),
        Recipe(
            name="deepseek_fp8",
            matrix_weight_bytes=1 + FP8_SCALE_BYTES,
            other_weight_bytes=2,
            master_bytes=4,
            gradient_bytes=4,
            matrix_moment_bytes=4,
            other_moment_bytes=4,
            activation_bytes=2,
            linear_input_bytes=1 + 4 / 128,
            attention_output_bytes=1.5,
            product_bytes=2,
            source="DeepSeek-V3 §3.3: FP8 products, float32 master weights and gradients, both moments in bf16 (12 bytes of "
            "states), inputs of linear maps cached in FP8 tiles of 128, after attention in E5M6",
        ),
    )
}
"""By name."""


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ConfigError: there is none; lists the names there are.
    """
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}{did_you_mean(name, RECIPES)}; recipes are {', '.join(RECIPES)}.")
    return RECIPES[name]


def layer_activations(config: ModelConfig, layer: int, recipe: Recipe, recompute: Recompute) -> LayerActivations:
    """What layer `layer` keeps of one token, its experts' share included (spread evenly, so the same on every device).

    Whole bytes, each part rounded up.
    """
    wide, narrow = recipe.activation_bytes, recipe.linear_input_bytes
    hidden, heads = config.hidden_size, config.num_attention_heads
    if recompute == "full":
        return _layer(residual=hidden * wide)
    keeps_all = recompute == "none"
    is_latent = config.attention == "mla"
    normed_latent = (config.q_lora_rank or 0) + config.kv_lora_rank if is_latent else 0
    value_width = config.v_head_dim if is_latent else config.gqa_head_dim
    if is_latent:
        head_width = heads * (2 * config.qk_head_dim + value_width)
    else:
        head_width = (heads + 2 * (heads if recipe.repeats_kv_heads else config.kv_heads)) * value_width
    latents = normed_latent * (wide + (narrow if keeps_all else 0))
    latents += config.qk_rope_head_dim * wide if is_latent else 0
    # Without latents there is nothing small to recompute queries, keys and values from but the norm's input: they stay.
    keeps_heads = keeps_all or not is_latent
    routing, width, is_fused = 0.0, config.intermediate_size, recipe.kept_of_networks == "fused" and keeps_all
    if config.is_moe_layer(layer):
        copies = config.num_experts_per_tok
        width = config.moe_intermediate_size * (copies + config.n_shared_experts)
        routing = 4 * (config.n_routed_experts or 0)
        # Fused, an expert's tokens are gathered by index: two whole numbers and a weight for each choice.
        routing += copies * 20 if is_fused else copies * hidden * (narrow + (recipe.product_bytes if keeps_all else 0))
    return _layer(
        residual=2 * hidden * (wide + (narrow if keeps_all else 0)),
        latents=latents,
        heads=head_width * wide if keeps_heads else 0,
        attention_output=heads * (value_width * recipe.attention_output_bytes + 4),
        routing=routing,
        feed_forward=_network_bytes(width, recipe, keeps_all),
    )


def _network_bytes(width: int, recipe: Recipe, keeps_all: bool) -> float:
    """Of the middle of SwiGLU networks, `width` numbers wide."""
    if not keeps_all:
        return width * 2 * recipe.linear_input_bytes
    product = recipe.linear_input_bytes if recipe.kept_of_networks == "all" else 0
    return width * (2 * recipe.product_bytes + product)


def _layer(**parts: float) -> LayerActivations:
    """Whole bytes; parts that are not named are 0."""
    return LayerActivations(**{one.name: math.ceil(parts.get(one.name, 0)) for one in fields(LayerActivations)})
