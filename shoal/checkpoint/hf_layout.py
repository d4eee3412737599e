"""Which published tensor fills which part of which parameter: one table for reading and for writing.

Published checkpoints hold gate and up projections apart and every expert by itself; in memory they are fused
(`[2F, D]`, gate rows first) and stacked (`[E, 2F, D]`, `[E, D, F]`). Multi-token prediction layers are published as
decoder layers after the last one, with copies of embedding and head that are dropped when read and written again.
Everything else only changes its prefix.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from shoal.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """One published tensor."""

    key: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()
    """What it fills of the parameter; empty is all of it."""


@dataclass(frozen=True)
class Entry:
    """One parameter or buffer of the model, and the published tensors it is made of."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    is_float32: bool = False
    """Kept in float32 whatever the rest is stored in (the balance bias)."""


def layout(config: ModelConfig) -> list[Entry]:
    """Every tensor of a `Transformer` of this config, in the order of the model."""
    embedding = (config.vocab_size, config.hidden_size)
    entries = [_whole("embed_tokens.weight", "model.embed_tokens.weight", embedding)]
    for layer in range(config.num_hidden_layers):
        entries += _decoder_layer(config, layer, f"layers.{layer}.", f"model.layers.{layer}.")
    entries.append(_whole("norm.weight", "model.norm.weight", (config.hidden_size,)))
    if not config.tie_word_embeddings:
        entries.append(_whole("lm_head.weight", "lm_head.weight", embedding))
    for depth in range(config.num_nextn_predict_layers):
        entries += _prediction_module(config, depth)
    return entries


def repeated_keys(config: ModelConfig) -> dict[str, str]:
    """Published tensors that repeat another one, by key; each prediction layer carries embedding and head."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    repeats = {}
    for depth in range(config.num_nextn_predict_layers):
        prefix = prediction_prefix(config, depth)
        repeats[f"{prefix}embed_tokens.weight"] = "model.embed_tokens.weight"
        repeats[f"{prefix}shared_head.head.weight"] = head
    return repeats


def prediction_prefix(config: ModelConfig, depth: int) -> str:
    """Published prefix of a multi-token-prediction layer."""
    return f"model.layers.{config.num_hidden_layers + depth}."


def _prediction_module(config: ModelConfig, depth: int) -> Iterator[Entry]:
    ours, theirs, hidden = f"mtp.{depth}.", prediction_prefix(config, depth), config.hidden_size
    yield _whole(f"{ours}enorm.weight", f"{theirs}enorm.weight", (hidden,))
    yield _whole(f"{ours}hnorm.weight", f"{theirs}hnorm.weight", (hidden,))
    yield _whole(f"{ours}eh_proj.weight", f"{theirs}eh_proj.weight", (hidden, 2 * hidden))
    yield from _decoder_layer(config, config.num_hidden_layers + depth, f"{ours}block.", theirs)
    yield _whole(f"{ours}shared_head_norm.weight", f"{theirs}shared_head.norm.weight", (hidden,))


def _decoder_layer(config: ModelConfig, layer: int, ours: str, theirs: str) -> Iterator[Entry]:
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    attention = _latent_shapes(config) if config.attention == "mla" else _grouped_shapes(config)
    shapes |= {f"self_attn.{name}": shape for name, shape in attention.items()}
    for name, shape in shapes.items():
        yield _whole(f"{ours}{name}.weight", f"{theirs}{name}.weight", shape)
    if not config.is_moe_layer(layer):
        yield from _swiglu(f"{ours}mlp.", f"{theirs}mlp.", hidden, config.intermediate_size)
        return
    yield from _mixture(config, f"{ours}mlp.", f"{theirs}mlp.")


def _latent_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * config.qk_head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if config.q_lora_rank is None:
        shapes["q_proj"] = (queries, hidden)
    else:
        shapes["q_a_proj"] = (config.q_lora_rank, hidden)
        shapes["q_a_layernorm"] = (config.q_lora_rank,)
        shapes["q_b_proj"] = (queries, config.q_lora_rank)
    shapes["kv_a_proj_with_mqa"] = (latent + config.qk_rope_head_dim, hidden)
    shapes["kv_a_layernorm"] = (latent,)
    shapes["kv_b_proj"] = (heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
    shapes["o_proj"] = (hidden, heads * config.v_head_dim)
    return shapes


def _grouped_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, width = config.hidden_size, config.gqa_head_dim
    queries, keys = config.num_attention_heads * width, config.kv_heads * width
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }


def _swiglu(ours: str, theirs: str, hidden: int, width: int) -> Iterator[Entry]:
    parts = (
        Part(f"{theirs}gate_proj.weight", (width, hidden), (slice(0, width),)),
        Part(f"{theirs}up_proj.weight", (width, hidden), (slice(width, 2 * width),)),
    )
    yield Entry(f"{ours}gate_up_proj.weight", (2 * width, hidden), parts)
    yield _whole(f"{ours}down_proj.weight", f"{theirs}down_proj.weight", (hidden, width))


def _mixture(config: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    assert config.n_routed_experts is not None
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield _whole(f"{ours}gate.weight", f"{theirs}gate.weight", (experts, hidden))
    if config.topk_method == "noaux_tc":
        key = f"{theirs}gate.e_score_correction_bias"
        parts = (Part(key, (experts,)),)
        yield Entry(f"{ours}gate.e_score_correction_bias", (experts,), parts, is_float32=True)
    gate_up, down = [], []
    for expert in range(experts):
        prefix = f"{theirs}experts.{expert}."
        gate_up.append(Part(f"{prefix}gate_proj.weight", (width, hidden), (expert, slice(0, width))))
        gate_up.append(Part(f"{prefix}up_proj.weight", (width, hidden), (expert, slice(width, 2 * width))))
        down.append(Part(f"{prefix}down_proj.weight", (hidden, width), (expert,)))
    yield Entry(f"{ours}experts.gate_up_proj", (experts, 2 * width, hidden), tuple(gate_up))
    yield Entry(f"{ours}experts.down_proj", (experts, hidden, width), tuple(down))
    if config.n_shared_experts:
        shared = f"{ours}shared_experts.", f"{theirs}shared_experts."
        yield from _swiglu(*shared, hidden, config.n_shared_experts * width)


def _whole(name: str, key: str, shape: tuple[int, ...]) -> Entry:
    return Entry(name, shape, (Part(key, shape),))
