"""One copy of a model on the devices that serve it together: what each holds, and what fits beside the weights.

Two layouts. *Expert parallel* is DeepSeek's (V3 §3.4, open-infra-index day 6): every device holds the attention and its own
sequences, the routed experts are spread, tokens travel. *Tensor parallel* splits every matrix over all devices and sums twice
a layer, as dense models are served; there MLA's one latent must be kept by every device, GQA's heads are split.
"""

import math
from dataclasses import dataclass
from typing import Literal

from shoal.config import ModelConfig
from shoal.errors import ConfigError, did_you_mean
from shoal.planner.checks import check_count, check_fraction
from shoal.planner.counts import cache_elements_per_token, parameter_counts
from shoal.planner.hardware import Cluster, Precision

Layout = Literal["expert_parallel", "tensor_parallel"]
BF16_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How matrices are stored and multiplied; embedding, router and norms stay bf16."""

    name: str
    bytes_per_weight: float
    """With its share of the scales."""
    arithmetic: Precision
    is_head_converted: bool
    """Whether the output head is stored so too."""


WEIGHT_FORMATS: dict[str, WeightFormat] = {
    one.name: one
    for one in (
        WeightFormat(name="bf16", bytes_per_weight=2, arithmetic="bf16", is_head_converted=True),
        # V3's release: one float32 scale for 128 by 128 weights, head in bf16.
        WeightFormat(name="fp8", bytes_per_weight=1 + 4 / 128**2, arithmetic="fp8", is_head_converted=False),
        # Shoal's own: a scale per row, far below a percent and left out; a bf16 scale per 32 weights.
        WeightFormat(name="int8", bytes_per_weight=1, arithmetic="int8", is_head_converted=True),
        WeightFormat(name="int4", bytes_per_weight=0.5 + 2 / 32, arithmetic="int8", is_head_converted=True),
    )
}


@dataclass(frozen=True, kw_only=True)
class Achieved:
    """Shares of the hardware's peak that are reached; 1 is the roofline itself."""

    bandwidth_fraction: float = 1.0
    flops_fraction: float = 1.0
    network_fraction: float = 1.0

    def __post_init__(self) -> None:
        for name in ("bandwidth_fraction", "flops_fraction", "network_fraction"):
            check_fraction(name, getattr(self, name), above_zero=True)


ROOFLINE = Achieved()


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One copy of a model on the devices that serve it together."""

    config: ModelConfig
    cluster: Cluster
    weights: str = "fp8"
    """A name in `WEIGHT_FORMATS`."""
    layout: Layout | None = None
    """None takes expert parallel for a mixture of experts and tensor parallel for a dense model."""
    cache_bytes_per_element: float = 2.0
    """2 is bf16; 656 / 576 is V3.2's layout, 0.75 the six bits that V2 was served with."""
    reserve_fraction: float = 0.1
    """Of each device's memory, for activations, buffers and the runtime."""
    achieved: Achieved = ROOFLINE

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_FORMATS:
            raise ConfigError(
                f"unknown weight format {self.weights!r}{did_you_mean(self.weights, WEIGHT_FORMATS)}; use "
                f"{', '.join(WEIGHT_FORMATS)}."
            )
        if self.layout not in (None, "expert_parallel", "tensor_parallel"):
            raise ConfigError(f"layout={self.layout!r} is unknown; use expert_parallel, tensor_parallel or None.")
        if self.layout == "expert_parallel" and self.config.n_routed_experts is None:
            raise ConfigError("a dense model has no experts to spread; use layout tensor_parallel.")
        if not 0 < self.cache_bytes_per_element <= 8:
            raise ConfigError(
                f"cache_bytes_per_element={self.cache_bytes_per_element} must be above 0 and at most 8; bf16 is 2."
            )
        check_fraction("reserve_fraction", self.reserve_fraction)
        if self.cluster.count > 1 and self.link_bytes_per_s == 0:
            raise ConfigError(f"{self.cluster.device.name} has no link to other devices; plan for one of them.")

    @property
    def is_expert_parallel(self) -> bool:
        """The layout, `None` resolved."""
        chosen = self.layout or ("tensor_parallel" if self.config.n_routed_experts is None else "expert_parallel")
        return chosen == "expert_parallel"

    @property
    def format(self) -> WeightFormat:
        """The stored format behind its name."""
        return WEIGHT_FORMATS[self.weights]

    @property
    def link_bytes_per_s(self) -> float:
        """The slowest link that tokens cross: inside the machine, or between machines where there are several."""
        device = self.cluster.device
        return device.link_bytes_per_s if self.cluster.num_nodes == 1 else device.network_bytes_per_s

    @property
    def cache_bytes_per_token(self) -> float:
        """Of one sequence, over all layers, wherever it lies."""
        return cache_elements_per_token(self.config) * self.cache_bytes_per_element

    @property
    def expert_share(self) -> float:
        """Part of each layer's routed experts on one device: at least one of them."""
        if not self.is_expert_parallel:
            return 1 / self.cluster.count
        return max(1 / self.cluster.count, 1 / (self.config.n_routed_experts or 1))

    @property
    def cache_share(self) -> float:
        """Part of a sequence's cache on a device that serves it."""
        if self.is_expert_parallel or self.config.attention == "mla":
            return 1.0
        return 1 / min(self.cluster.count, self.config.kv_heads)

    def sequences_per_device(self, num_sequences: int) -> int:
        """Sequences that the fullest device works on."""
        return math.ceil(num_sequences / self.cluster.count) if self.is_expert_parallel else num_sequences


@dataclass(frozen=True, kw_only=True)
class BatchFit:
    """How one device's memory divides; the four parts add up to it where the weights fit."""

    device_bytes: float
    reserve_bytes: float
    weight_bytes: float
    cache_bytes: float
    """Of the largest batch."""
    sequences: int
    """Of the whole cluster; 0 where not one fits."""

    @property
    def unused_bytes(self) -> float:
        """Left over; negative where the weights alone do not fit."""
        return self.device_bytes - self.reserve_bytes - self.weight_bytes - self.cache_bytes


def weight_bytes_by_part(config: ModelConfig, weights: WeightFormat) -> dict[str, float]:
    """The whole model in memory, multi-token-prediction modules left out."""
    parts = parameter_counts(config).by_part()
    plain = {"embedding", "router", "norms"} | (set() if weights.is_head_converted else {"head"})
    del parts["mtp"]
    return {part: count * (BF16_BYTES if part in plain else weights.bytes_per_weight) for part, count in parts.items()}


def weight_bytes_per_device(deployment: Deployment) -> dict[str, float]:
    """What each device holds of the model, by part."""
    parts = weight_bytes_by_part(deployment.config, deployment.format)
    rest = 1.0 if deployment.is_expert_parallel else 1 / deployment.cluster.count
    return {
        part: size * (deployment.expert_share if part == "routed_experts" else rest) for part, size in parts.items()
    }


def largest_batch(deployment: Deployment, context_tokens: int) -> BatchFit:
    """The most sequences of `context_tokens` whose cache fits beside the weights."""
    check_count("context_tokens", context_tokens, low=1)
    device_bytes = float(deployment.cluster.device.memory_bytes)
    reserve = device_bytes * deployment.reserve_fraction
    weights = sum(weight_bytes_per_device(deployment).values())
    per_sequence = context_tokens * deployment.cache_bytes_per_token * deployment.cache_share
    on_device = int(max(0.0, device_bytes - reserve - weights) // per_sequence)
    return BatchFit(
        device_bytes=device_bytes,
        reserve_bytes=reserve,
        weight_bytes=weights,
        cache_bytes=on_device * per_sequence,
        sequences=on_device * (deployment.cluster.count if deployment.is_expert_parallel else 1),
    )


def largest_context(deployment: Deployment, num_sequences: int) -> int:
    """The longest context, in tokens, that `num_sequences` can all have; 0 where the weights leave no room."""
    check_count("num_sequences", num_sequences, low=1)
    on_device = deployment.sequences_per_device(num_sequences) * deployment.cache_share
    one_token = largest_batch(deployment, 1)
    return int(
        (one_token.cache_bytes + max(0.0, one_token.unused_bytes)) // (on_device * deployment.cache_bytes_per_token)
    )
