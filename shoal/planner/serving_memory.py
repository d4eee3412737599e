"""How many bytes serving a model needs on each device: weights by stored format, cache, one step's working room.

Two layouts share a model over several devices. *tensor* cuts every matrix into as many pieces, and the keys and values of
GQA by their heads; the latent of MLA has no heads to cut, so every device keeps all of it. *expert* is DeepSeek's (V3 §3.4):
attention is repeated on every device, each for its own sequences, and only the experts are dealt out, so the cache divides
by the devices though it is a latent. The difference decides how many sequences fit.

Formats: fp8 has a float32 scale per block of 128 by 128 weights, int4 a bf16 scale per group of 32, int8 one per row (left
out, under half a percent). Embedding, head, router and norms keep `other_weights`, as published FP8 files do. A cache in
fp8 is FlashMLA's: 512 codes, 4 float32 scales and 64 rotary numbers in bf16 are V3.2's 656 bytes per token and layer.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.planner.activations import FP8_SCALE_BYTES, layer_activations, recipe
from shoal.planner.checks import check_count, check_word
from shoal.planner.hardware import Device
from shoal.planner.memory import alike_layers, fits, largest, layer_parameters

WeightFormat = Literal["fp32", "bf16", "fp8", "int8", "int4"]
CacheFormat = Literal["fp32", "bf16", "fp8"]
Layout = Literal["tensor", "expert"]

INT4_GROUP = 32
WEIGHT_BYTES: dict[WeightFormat, float] = {
    "fp32": 4,
    "bf16": 2,
    "fp8": 1 + FP8_SCALE_BYTES,
    "int8": 1,
    "int4": 0.5 + 2 / INT4_GROUP,
}
"""Per weight, scales included."""


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """What is served, as far as memory cares."""

    weights: WeightFormat = "bf16"
    """Of attention, feed-forward layers and experts."""
    other_weights: WeightFormat = "bf16"
    """Of embedding, head, router and norms."""
    cache: CacheFormat = "bf16"
    cache_bytes_per_number: float | None = None
    """Instead of a format: scales included, 0.75 for the six bits that DeepSeek-V2 was served with."""
    num_sequences: int = 1
    """At once, over all devices."""
    context_tokens: int = 4096
    """Cached per sequence."""
    num_devices: int = 1
    layout: Layout = "expert"
    chunk_tokens: int = 2048
    """Prompt tokens that one step works on."""
    with_mtp: bool = False
    """Whether the multi-token-prediction modules draft: their weights, and a cached layer each."""

    def __post_init__(self) -> None:
        for name in ("num_sequences", "context_tokens", "num_devices", "chunk_tokens"):
            check_count(name, getattr(self, name))
        for name, words in (("weights", WeightFormat), ("other_weights", WeightFormat), ("cache", CacheFormat)):
            check_word(name, getattr(self, name), get_args(words))
        check_word("layout", self.layout, get_args(Layout))
        if self.cache_bytes_per_number is not None and not 0 < self.cache_bytes_per_number <= 8:
            raise ConfigError(
                f"cache_bytes_per_number={self.cache_bytes_per_number} must be above 0 and at most 8; bf16 is 2."
            )


@dataclass(frozen=True, kw_only=True)
class ServingMemory:
    """Bytes on the fullest device."""

    weights: int
    cache: int
    working: int
    """Activations of one layer for one step."""
    logits: int
    """One float32 row per sequence of this device."""

    @property
    def total_bytes(self) -> int:
        """All parts."""
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, int]:
        """The disjoint parts."""
        return dict(vars(self))


def serving_memory(config: ModelConfig, plan: ServingPlan) -> ServingMemory:
    """Bytes on the fullest device."""
    shares = plan.num_devices if plan.layout == "tensor" else 1
    sequences = plan.num_sequences if plan.layout == "tensor" else math.ceil(plan.num_sequences / plan.num_devices)
    cache_shares = 1 if config.attention == "mla" else min(shares, config.kv_heads)
    working = max(
        layer_activations(config, layer, recipe("bf16"), "none").total_bytes for layer in _unlike_layers(config)
    )
    return ServingMemory(
        weights=_weight_bytes(config, plan, shares),
        cache=math.ceil(sequences * plan.context_tokens * served_cache_bytes_per_token(config, plan) / cache_shares),
        working=math.ceil(working * plan.chunk_tokens / shares),
        logits=math.ceil(4 * sequences * config.vocab_size / shares),
    )


def served_cache_bytes_per_token(config: ModelConfig, plan: ServingPlan) -> int:
    """Of one sequence over all layers, in the format of `plan.cache`."""
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if plan.with_mtp else 0)
    if plan.cache_bytes_per_number is not None:
        return math.ceil(layers * config.cache_width * plan.cache_bytes_per_number)
    if plan.cache != "fp8":
        return layers * config.cache_width * (4 if plan.cache == "fp32" else 2)
    if config.attention == "mla":
        return layers * (config.kv_lora_rank + 4 * math.ceil(config.kv_lora_rank / 128) + 2 * config.qk_rope_head_dim)
    return layers * (config.cache_width + 4 * 2 * config.kv_heads)  # a scale per head for keys, and one for values


def fewest_devices(
    config: ModelConfig, device: Device, plan: ServingPlan, *, max_devices: int = 1024, reserve_fraction: float = 0.1
) -> int | None:
    """Devices that hold `plan` (its own `num_devices` is not looked at); None where even `max_devices` do not."""
    check_count("max_devices", max_devices)

    def too_few(count: int) -> bool:
        return not _fits(config, device, replace(plan, num_devices=count), reserve_fraction)

    if too_few(max_devices):
        return None
    return largest(too_few, max_devices) + 1


def most_sequences(config: ModelConfig, device: Device, plan: ServingPlan, *, reserve_fraction: float = 0.1) -> int:
    """Sequences of `plan.context_tokens` that fit at once; 0 where not even one does."""
    return largest(lambda count: _fits(config, device, replace(plan, num_sequences=count), reserve_fraction))


def longest_context(config: ModelConfig, device: Device, plan: ServingPlan, *, reserve_fraction: float = 0.1) -> int:
    """Cached tokens per sequence that fit, whatever positions the model knows; 0 where not even one does."""
    return largest(lambda tokens: _fits(config, device, replace(plan, context_tokens=tokens), reserve_fraction))


def _fits(config: ModelConfig, device: Device, plan: ServingPlan, reserve_fraction: float) -> bool:
    return fits(serving_memory(config, plan).total_bytes, device, reserve_fraction=reserve_fraction).fits


def _weight_bytes(config: ModelConfig, plan: ServingPlan, shares: int) -> int:
    expert_devices = plan.num_devices if plan.layout == "expert" else 1
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if plan.with_mtp else 0)
    matrices, others = 0, config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    others += config.hidden_size
    for layer, count in alike_layers(config, range(layers)):
        held = layer_parameters(config, layer, expert_devices)
        matrices += count * (held.experts + held.matrices)
        others += count * held.others
    return math.ceil((matrices * WEIGHT_BYTES[plan.weights] + others * WEIGHT_BYTES[plan.other_weights]) / shares)


def _unlike_layers(config: ModelConfig) -> set[int]:
    """One layer of each kind."""
    return {0, config.num_hidden_layers - 1}
