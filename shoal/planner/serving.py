"""How fast, how many and how dear: serving a model on given hardware, from its bytes and its operations.

A pass over the model reads the weights its tokens need, reads their cache, multiplies, and sends tokens between devices. None
of the four can be faster than the hardware's figure for it, and at best they overlap completely, so the pass takes at least
the longest of them: the roofline. It is a bound, never a forecast; `Achieved` scales it by what a measurement reached. DeepSeek's
production fleet of February 2025 reached 14.8k tokens/s per H800 node in decoding, under half of what this file gives at
most. A range is had by asking twice.

Two layouts. *Expert parallel* is DeepSeek's (V3 §3.4, open-infra-index day 6): every device holds the attention and its own
sequences, the routed experts are spread, tokens travel. *Tensor parallel* splits every matrix over all devices and sums twice
a layer, as dense models are served; there MLA's one latent must be kept by every device, GQA's heads are split.

Which experts are read depends on the batch: E experts of which each of n tokens picks k leave one untouched with probability
(1 - k/E)^n, hence E (1 - (1 - k/E)^n) are read under even, independent routing. Real routing is less even and reads fewer.

Latency, host time, imbalance and activations' traffic are left out; all of them only slow.

The second half turns speeds into machines, money and joules, and recomputes DeepSeek's published day (`published_figures`).
What the published inputs do not give is said in words (`not_recomputed`). Prefill throughput is quoted by DeepSeek with
cached tokens counted in; `nodes_needed` asks which of the two is meant.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from decimal import Decimal
from typing import Literal

from shoal.config import ModelConfig
from shoal.errors import ConfigError, did_you_mean
from shoal.planner.cost import Cost, CostAssumptions, training_cost, usd_per_million_tokens
from shoal.planner.counts import (
    cache_elements_per_token,
    decode_flops_per_token,
    parameter_counts,
    prefill_flops,
)
from shoal.planner.hardware import DEVICES, Cluster, Precision
from shoal.planner.network import DecodeLimit, all_to_all_time_us, decode_limit
from shoal.planner.prices import Price, charge, price_at
from shoal.planner.rivals import NotRecomputed
from shoal.presets import PRESETS

Layout = Literal["expert_parallel", "tensor_parallel"]
BF16_BYTES = 2
DAY_S = 86_400.0


def _check_count(name: str, value: int, *, low: int) -> None:
    if type(value) is not int or value < low:
        raise ConfigError(f"{name}={value!r} must be a whole number, at least {low}.")


def _check_fraction(name: str, value: float, *, above_zero: bool = False) -> None:
    if not 0 <= value <= 1 or (above_zero and value == 0):
        raise ConfigError(
            f"{name}={value} must be {'above 0 and at most' if above_zero else 'from 0 to'} 1; 0.5 is half."
        )


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
            _check_fraction(name, getattr(self, name), above_zero=True)


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
        _check_fraction("reserve_fraction", self.reserve_fraction)
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
class Pass:
    """One pass of a batch over the model, as a bound on its time."""

    kind: Literal["decode", "prefill"]
    num_tokens: int
    """Of the whole cluster in one pass."""
    num_sequences: int
    num_devices: int
    read_bytes: Mapping[str, float] = field(hash=False)
    """What one device moves from or to its memory, by part; the sum over bandwidth is `memory_s`."""
    memory_s: float
    linear_s: float
    attention_s: float
    network_s: float

    @property
    def compute_s(self) -> float:
        """Both kinds of products; they share the same units and cannot overlap."""
        return self.linear_s + self.attention_s

    @property
    def pass_s(self) -> float:
        """The longest of memory, computation and network."""
        return max(self.memory_s, self.compute_s, self.network_s)

    @property
    def limited_by(self) -> Literal["memory", "compute", "network"]:
        """Which of the three that is."""
        if self.memory_s == self.pass_s:
            return "memory"
        return "compute" if self.compute_s == self.pass_s else "network"

    @property
    def tokens_per_s(self) -> float:
        """Of the whole cluster."""
        return self.num_tokens / self.pass_s

    @property
    def tokens_per_s_per_device(self) -> float:
        """Cluster speed by its devices."""
        return self.tokens_per_s / self.num_devices

    @property
    def tokens_per_s_per_sequence(self) -> float:
        """What one user sees while decoding, without speculation."""
        return self.tokens_per_s / self.num_sequences


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


@dataclass(frozen=True, kw_only=True)
class SpeculationGain:
    """What one drafted token per pass brings."""

    acceptance_fraction: float
    extra_cost_fraction: float
    """How much longer a pass with draft takes."""
    speedup: float
    """(1 + acceptance) / (1 + extra cost); below 1 it slows."""


def expected_distinct_experts(num_experts: int, num_experts_per_tok: int, num_tokens: int) -> float:
    """Experts that at least one of `num_tokens` tokens picks, on average, routing being even and independent."""
    for name, value in (("num_experts", num_experts), ("num_experts_per_tok", num_experts_per_tok)):
        _check_count(name, value, low=1)
    _check_count("num_tokens", num_tokens, low=0)
    if num_experts_per_tok > num_experts:
        raise ConfigError(f"num_experts_per_tok={num_experts_per_tok} exceeds num_experts={num_experts}.")
    if num_experts_per_tok == num_experts:
        return float(num_experts if num_tokens else 0)
    # expm1 and log1p keep one token at exactly k, where 1 - (1 - k/E) would round.
    return -num_experts * math.expm1(num_tokens * math.log1p(-num_experts_per_tok / num_experts))


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
    _check_count("context_tokens", context_tokens, low=1)
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
    _check_count("num_sequences", num_sequences, low=1)
    on_device = deployment.sequences_per_device(num_sequences) * deployment.cache_share
    one_token = largest_batch(deployment, 1)
    return int(
        (one_token.cache_bytes + max(0.0, one_token.unused_bytes)) // (on_device * deployment.cache_bytes_per_token)
    )


def decode_pass(
    deployment: Deployment, *, num_sequences: int, context_tokens: int, tokens_per_sequence: int = 1
) -> Pass:
    """One step of decoding for a batch whose sequences all have `context_tokens` cached tokens.

    Args:
        num_sequences: of the whole cluster; whether their cache fits is `largest_batch`'s business.
        tokens_per_sequence: 2 verifies one drafted token. The cache is read once for all of them.
    """
    _check_count("num_sequences", num_sequences, low=1)
    _check_count("context_tokens", context_tokens, low=0)
    _check_count("tokens_per_sequence", tokens_per_sequence, low=1)
    config = deployment.config
    cached = deployment.sequences_per_device(num_sequences) * context_tokens * deployment.cache_share
    linear = 2.0 * parameter_counts(config).active
    return _bounded(
        deployment,
        kind="decode",
        num_sequences=num_sequences,
        tokens_per_sequence=tokens_per_sequence,
        cache_bytes=cached * deployment.cache_bytes_per_token,
        linear_flops=linear,
        attention_flops=decode_flops_per_token(config, context_tokens) - linear,
        copies=config.num_experts_per_tok,
    )


def prefill_pass(deployment: Deployment, *, num_prompts: int, prompt_tokens: int) -> Pass:
    """Reading `num_prompts` whole prompts at once, none of it cached.

    Where routing is limited to some machines, a token is sent once to each and handed on inside (DeepEP's normal kernels).
    """
    _check_count("num_prompts", num_prompts, low=1)
    _check_count("prompt_tokens", prompt_tokens, low=1)
    config = deployment.config
    is_limited = config.n_group > 1 and deployment.cluster.num_nodes > 1
    tokens = deployment.sequences_per_device(num_prompts) * prompt_tokens * deployment.cache_share
    head = 2.0 * config.vocab_size * config.hidden_size
    linear = 2.0 * parameter_counts(config).active - head + head / prompt_tokens
    return _bounded(
        deployment,
        kind="prefill",
        num_sequences=num_prompts,
        tokens_per_sequence=prompt_tokens,
        cache_bytes=tokens * deployment.cache_bytes_per_token,
        linear_flops=linear,
        attention_flops=prefill_flops(config, prompt_tokens) / prompt_tokens - linear,
        copies=min(config.topk_group, config.num_experts_per_tok) if is_limited else config.num_experts_per_tok,
    )


def speculation_gain(acceptance_fraction: float, extra_cost_fraction: float = 0.0) -> SpeculationGain:
    """One drafted token per pass, kept with the given probability.

    V3 §5.4.3 reports 85 to 90 % and 1.8 times the speed, which is an extra cost of 2.8 to 5.6 %.
    """
    _check_fraction("acceptance_fraction", acceptance_fraction)
    if not 0 <= extra_cost_fraction < math.inf:
        raise ConfigError(f"extra_cost_fraction={extra_cost_fraction} must be zero or more; 0.05 is 5 % longer.")
    return SpeculationGain(
        acceptance_fraction=acceptance_fraction,
        extra_cost_fraction=extra_cost_fraction,
        speedup=(1 + acceptance_fraction) / (1 + extra_cost_fraction),
    )


def speculation_gain_on(
    deployment: Deployment, acceptance_fraction: float, *, num_sequences: int, context_tokens: int
) -> SpeculationGain:
    """The gain where the extra cost is what the roofline says of twice the tokens and one drafting layer.

    Small batches of a mixture of experts gain little: a second token wants other experts, and reading them is the cost.
    """
    plain = decode_pass(deployment, num_sequences=num_sequences, context_tokens=context_tokens)
    checked = decode_pass(deployment, num_sequences=num_sequences, context_tokens=context_tokens, tokens_per_sequence=2)
    # A module of V3's kind: one layer, the shared head; its joining projection, 0.1B of 2.4B parameters, is left out.
    one_layer = replace(deployment.config, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    draft = decode_pass(
        replace(deployment, config=one_layer), num_sequences=num_sequences, context_tokens=context_tokens
    )
    return speculation_gain(acceptance_fraction, (checked.pass_s + draft.pass_s) / plain.pass_s - 1)


def expert_parallel_limit(config: ModelConfig, link_bytes_per_s: float, *, micro_batch_tokens: int = 32) -> DecodeLimit:
    """The speed of one sequence when nothing but expert traffic takes time, as ISCA 2025 §2.3.2 counts it: all layers."""
    if config.n_routed_experts is None:
        raise ConfigError("a dense model sends nothing to experts; this limit is for a mixture of experts.")
    transfer_us = all_to_all_time_us(
        num_tokens=micro_batch_tokens,
        hidden_size=config.hidden_size,
        num_experts_per_tok=config.num_experts_per_tok,
        n_shared_experts=config.n_shared_experts,
        link_gb_per_s=link_bytes_per_s / 1e9,
    )
    return decode_limit(transfer_us, num_layers=config.num_hidden_layers)


@dataclass(frozen=True, kw_only=True)
class Load:
    """Tokens to serve in a stretch of time."""

    hit_tokens: int
    """Of prompts, found in the context cache."""
    miss_tokens: int
    """Of prompts, computed."""
    output_tokens: int
    period_s: float = DAY_S

    def __post_init__(self) -> None:
        for name in ("hit_tokens", "miss_tokens", "output_tokens"):
            _check_count(name, getattr(self, name), low=0)
        if not 0 < self.period_s < math.inf:
            raise ConfigError(f"period_s={self.period_s} must be a positive number of seconds; a day is 86400.")
        if not self.input_tokens or not self.output_tokens:
            raise ConfigError("a load needs at least one prompt token and one output token.")

    @property
    def input_tokens(self) -> int:
        """All prompt tokens."""
        return self.hit_tokens + self.miss_tokens

    @property
    def hit_fraction(self) -> float:
        """Share of the prompt tokens that the cache held."""
        return self.hit_tokens / self.input_tokens


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Machines on average over the period; whole ones for the peak are the operator's choice."""

    prefill_nodes: float
    decode_nodes: float

    @property
    def nodes(self) -> float:
        """Both kinds."""
        return self.prefill_nodes + self.decode_nodes


@dataclass(frozen=True, kw_only=True)
class ServiceCost:
    """The bill of a load; the two parts add up to it."""

    load: Load
    prefill: Cost
    decode: Cost

    @property
    def usd(self) -> float:
        """Rent of all machines."""
        return self.prefill.rent_usd + self.decode.rent_usd

    @property
    def joules(self) -> float:
        """At the building's meter."""
        return (self.prefill.kwh + self.decode.kwh) * 3.6e6

    @property
    def usd_per_million_input_tokens(self) -> float:
        """Prefill alone; hits cost no computation but count as tokens."""
        return usd_per_million_tokens(self.prefill.rent_usd, self.load.input_tokens)

    @property
    def usd_per_million_output_tokens(self) -> float:
        """Decoding alone."""
        return usd_per_million_tokens(self.decode.rent_usd, self.load.output_tokens)

    @property
    def joules_per_million_tokens(self) -> float:
        """Over input and output."""
        return self.joules / (self.load.input_tokens + self.load.output_tokens) * 1e6

    @property
    def joules_per_output_token(self) -> float:
        """With all prefill put on the output."""
        return self.joules / self.load.output_tokens


@dataclass(frozen=True, kw_only=True)
class Margin:
    """What a load earns at a price list against what it costs."""

    hit_usd: Decimal
    miss_usd: Decimal
    output_usd: Decimal
    cost_usd: float

    @property
    def revenue_usd(self) -> Decimal:
        """The three together."""
        return self.hit_usd + self.miss_usd + self.output_usd

    @property
    def profit_usd(self) -> float:
        """Revenue less cost; research, staff and idle machines are not in it."""
        return float(self.revenue_usd) - self.cost_usd

    @property
    def profit_over_cost_fraction(self) -> float:
        """DeepSeek's "cost profit margin": 5.45 is 545 %."""
        return self.profit_usd / self.cost_usd

    @property
    def profit_over_revenue_fraction(self) -> float:
        """What accountants call a margin: at most 1; minus infinity when everything is given away."""
        if not self.revenue_usd:
            return -math.inf
        return self.profit_usd / float(self.revenue_usd)


@dataclass(frozen=True, kw_only=True)
class HitRatePoint:
    """A million prompt tokens of which the cache holds a share."""

    hit_fraction: float
    price_usd: float
    """To the customer."""
    saved_fraction: float
    """Of the customer's price without any hit."""
    cost_usd: float
    """To the operator."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A published figure and the same from its published inputs."""

    name: str
    unit: str
    published: float
    ours: float
    tolerance_fraction: float
    formula: str
    source: str

    @property
    def agrees(self) -> bool:
        """Within the tolerance of the published one."""
        return abs(self.ours - self.published) <= self.tolerance_fraction * abs(self.published)


def nodes_needed(
    load: Load, *, input_tokens_per_s_per_node: float, output_tokens_per_s_per_node: float, counts_hits: bool
) -> Fleet:
    """Machines that carry a load at the given speeds.

    Args:
        counts_hits: whether the input speed counts cached tokens as done, as DeepSeek's 73.7k does; False for a speed of
            computing, such as `prefill_pass` gives.
    """
    for name, value in (
        ("input_tokens_per_s_per_node", input_tokens_per_s_per_node),
        ("output_tokens_per_s_per_node", output_tokens_per_s_per_node),
    ):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name}={value} must be a positive number of tokens per second.")
    read = load.input_tokens if counts_hits else load.miss_tokens
    return Fleet(
        prefill_nodes=read / input_tokens_per_s_per_node / load.period_s,
        decode_nodes=load.output_tokens / output_tokens_per_s_per_node / load.period_s,
    )


def service_cost(load: Load, fleet: Fleet, node: CostAssumptions) -> ServiceCost:
    """Rent and energy of a fleet over the load's period.

    Args:
        node: of one machine, such as `Cluster(device=..., count=8).cost_assumptions()`.
    """
    return ServiceCost(
        load=load,
        prefill=training_cost(fleet.prefill_nodes * load.period_s, node),
        decode=training_cost(fleet.decode_nodes * load.period_s, node),
    )


def margin(load: Load, price: Price, when_utc: datetime, cost_usd: float) -> Margin:
    """Revenue at the price of one moment, exact, against a cost."""
    if not 0 < cost_usd < math.inf:
        raise ConfigError(f"cost_usd={cost_usd} must be a positive number of dollars.")
    return Margin(
        hit_usd=charge(price, when_utc, load.hit_tokens, 0, 0),
        miss_usd=charge(price, when_utc, 0, load.miss_tokens, 0),
        output_usd=charge(price, when_utc, 0, 0, load.output_tokens),
        cost_usd=cost_usd,
    )


def over_hit_rate(
    price: Price, when_utc: datetime, miss_cost_usd_per_million: float, hit_fractions: Sequence[float]
) -> tuple[HitRatePoint, ...]:
    """A million prompt tokens as the hit rate grows, for the customer and for the operator.

    Args:
        miss_cost_usd_per_million: computing a million tokens; a hit is read instead, disks and their network are not priced.
    """
    if not 0 <= miss_cost_usd_per_million < math.inf:
        raise ConfigError(f"miss_cost_usd_per_million={miss_cost_usd_per_million} must be zero or more dollars.")
    million = 10**6
    hit_usd = float(charge(price, when_utc, million, 0, 0))
    miss_usd = float(charge(price, when_utc, 0, million, 0))
    points = []
    for hit in hit_fractions:
        _check_fraction("hit_fraction", hit)
        paid = hit * hit_usd + (1 - hit) * miss_usd
        points.append(
            HitRatePoint(
                hit_fraction=hit,
                price_usd=paid,
                saved_fraction=1 - paid / miss_usd if miss_usd else 0.0,
                cost_usd=(1 - hit) * miss_cost_usd_per_million,
            )
        )
    return tuple(points)


DAY_6 = "DeepSeek open-infra-index, day 6, 1 March 2025"
PUBLISHED_LOAD = Load(hit_tokens=342 * 10**9, miss_tokens=(608 - 342) * 10**9, output_tokens=168 * 10**9)
"""DeepSeek's V3 and R1 service from 27 February 2025, noon in Beijing, to the next."""
PUBLISHED_FLEET_NODES = 226.75
PUBLISHED_START_UTC = datetime(2025, 2, 27, 4, tzinfo=timezone.utc)
PUBLISHED_DEVICES_PER_NODE = 8


def published_day() -> tuple[ServiceCost, Margin]:
    """DeepSeek's day: the published average fleet at 2 USD per GPU hour, every token at R1's standard price.

    The fleet divides between prefill and decoding as the published throughputs do; only its sum is published.
    """
    needed = _published_need()
    scale = PUBLISHED_FLEET_NODES / needed.nodes
    fleet = Fleet(prefill_nodes=needed.prefill_nodes * scale, decode_nodes=needed.decode_nodes * scale)
    node = Cluster(device=DEVICES["h800"], count=PUBLISHED_DEVICES_PER_NODE).cost_assumptions()
    cost = service_cost(PUBLISHED_LOAD, fleet, node)
    price = price_at("deepseek-reasoner", PUBLISHED_START_UTC)
    return cost, margin(PUBLISHED_LOAD, price, PUBLISHED_START_UTC, cost.usd)


def published_figures() -> tuple[Figure, ...]:
    """Every published serving figure that its published inputs give, recomputed."""
    cost, earned = published_day()

    def day(name: str, unit: str, published: float, ours: float, tolerance: float, formula: str) -> Figure:
        return Figure(
            name=name,
            unit=unit,
            published=published,
            ours=ours,
            tolerance_fraction=tolerance,
            formula=formula,
            source=DAY_6,
        )

    hit_percent = 100 * PUBLISHED_LOAD.hit_fraction
    profit_percent = 100 * earned.profit_over_cost_fraction
    return (
        day("share of prompt tokens found in the cache", "%", 56.3, hit_percent, 0.002, "342 / 608"),
        day("cost of a day", "USD", 87_072, cost.usd, 1e-9, "226.75 nodes x 8 GPUs x 24 h x 2 USD"),
        day(
            "theoretical income of a day",
            "USD",
            562_027,
            float(earned.revenue_usd),
            2e-4,
            "342e9 x 0.14 + 266e9 x 0.55 + 168e9 x 2.19 USD per million; the published tokens are rounded",
        ),
        day("profit over cost", "%", 545, profit_percent, 0.002, "(income - cost) / cost; theoretical, as they say"),
        day(
            "nodes",
            "nodes",
            PUBLISHED_FLEET_NODES,
            _published_need().nodes,
            1e-3,
            "608e9 / 73.7k / 86400 + 168e9 / 14.8k / 86400",
        ),
        *_published_limits(),
    )


def not_recomputed() -> tuple[NotRecomputed, ...]:
    """Published serving figures that stay open, with the range that their inputs leave."""
    night = datetime(2025, 2, 27, 20, tzinfo=timezone.utc)
    cost, earned = published_day()
    at_night = margin(PUBLISHED_LOAD, price_at("deepseek-reasoner", night), night, cost.usd)
    mwh = [PUBLISHED_FLEET_NODES * 24 * node_kw * 1.25 / 1e3 for node_kw in (8.0, 10.2)]
    joules = [energy * 3.6e9 / PUBLISHED_LOAD.output_tokens for energy in mwh]
    limit = Deployment(config=PRESETS["v3"], cluster=Cluster(device=DEVICES["h800"], count=144))
    batch = largest_batch(limit, 4989).sequences
    decoding = decode_pass(limit, num_sequences=batch, context_tokens=4989).tokens_per_s_per_device * 8
    v2 = Deployment(
        config=PRESETS["v2"], cluster=Cluster(device=DEVICES["h800"], count=8), cache_bytes_per_element=0.75
    )
    by_length = [
        decode_pass(v2, num_sequences=largest_batch(v2, tokens).sequences, context_tokens=tokens).tokens_per_s
        for tokens in (8192, 1024)
    ]
    return (
        NotRecomputed(
            figure="real income of DeepSeek's day",
            published="substantially lower than the theoretical 562,027 USD",
            ours=f"{at_night.revenue_usd:,.0f} to {earned.revenue_usd:,.0f} USD for tokens that were paid at R1's price",
            why="how many tokens were V3's, free of charge in web and app, or sold at night is not published",
        ),
        NotRecomputed(
            figure="electricity of DeepSeek's day",
            published="none",
            ours=f"{mwh[0]:.0f} to {mwh[1]:.0f} MWh, {joules[0]:.1f} to {joules[1]:.1f} J per output token, prefill included",
            why="8 to 10.2 kW per node and a PUE of 1.25 are our assumptions; neither power nor PUE is published",
        ),
        NotRecomputed(
            figure="14.8k output tokens/s per node",
            published="14.8k at 4,989 cached tokens on average",
            ours=f"at most {decoding / 1e3:.0f}k on 144 H800 with {batch / 144:.0f} sequences each",
            why="the batch is not published, and a roofline is a bound; it enters the fleet above as published",
        ),
        NotRecomputed(
            figure="DeepSeek-V2 generates more than 50K tokens/s per node, 5.76 times DeepSeek 67B",
            published="> 50K tokens/s; 5.76 times",
            ours=f"at most {by_length[0] / 1e3:.0f}k at 8,192 cached tokens to {by_length[1] / 1e3:.0f}k at 1,024",
            why="measured with FP8 weights and a 6-bit cache on the length distribution of a service, which is not published",
        ),
        NotRecomputed(
            figure="multi-token prediction makes decoding 1.8 times faster",
            published="1.8 times at 85 to 90 % acceptance (DeepSeek-V3 5.4.3)",
            ours=f"{speculation_gain(0.85).speedup:.2f} to {speculation_gain(0.9).speedup:.2f} times before the extra cost",
            why=f"1.8 needs an extra cost of {100 * (1.85 / 1.8 - 1):.1f} to {100 * (1.9 / 1.8 - 1):.1f} %, which is not published",
        ),
    )


def _published_need() -> Fleet:
    return nodes_needed(
        PUBLISHED_LOAD, input_tokens_per_s_per_node=73.7e3, output_tokens_per_s_per_node=14.8e3, counts_hits=True
    )


def _published_limits() -> list[Figure]:
    """ISCA 2025 §2.3.2, with its hidden size of 7,000; V3's own is 7,168."""
    rounded = replace(PRESETS["v3"], hidden_size=7000)
    figures = []
    for link, link_bytes_per_s, tpot_ms, tokens_per_s in (
        ("400G InfiniBand", 50e9, 14.76, 67.0),
        ("NVL72", 900e9, 0.82, 1200.0),
    ):
        limit = expert_parallel_limit(rounded, link_bytes_per_s)
        for name, unit, published, ours, tolerance in (
            (f"time per output token over {link}", "ms", tpot_ms, limit.tpot_ms, 1e-3),
            (f"output speed of one user over {link}", "tokens/s", tokens_per_s, limit.tokens_per_s, 0.02),
        ):
            figures.append(
                Figure(
                    name=name,
                    unit=unit,
                    published=published,
                    ours=ours,
                    tolerance_fraction=tolerance,
                    formula="2 x 61 layers x 3 B x 32 tokens x 9 experts x 7000 / link",
                    source="Insights into DeepSeek-V3 (ISCA 2025) 2.3.2",
                )
            )
    return figures


def _bounded(
    deployment: Deployment,
    *,
    kind: Literal["decode", "prefill"],
    num_sequences: int,
    tokens_per_sequence: int,
    cache_bytes: float,
    linear_flops: float,
    attention_flops: float,
    copies: int,
) -> Pass:
    """Each of the four times for the fullest device; FLOPs are per token."""
    cluster, achieved = deployment.cluster, deployment.achieved
    num_tokens = num_sequences * tokens_per_sequence
    on_device = deployment.sequences_per_device(num_sequences) * tokens_per_sequence
    worked = on_device if deployment.is_expert_parallel else on_device / cluster.count
    read = {**_weight_bytes_read(deployment, num_tokens), "cache": cache_bytes}
    device, flops_fraction = cluster.device, achieved.flops_fraction
    return Pass(
        kind=kind,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        num_devices=cluster.count,
        read_bytes=read,
        memory_s=sum(read.values()) / (device.bandwidth_bytes_per_s * achieved.bandwidth_fraction),
        linear_s=worked * linear_flops / (device.peak_flops(deployment.format.arithmetic) * flops_fraction),
        attention_s=worked * attention_flops / (device.peak_flops("bf16") * flops_fraction),
        network_s=_network_s(deployment, on_device, copies) / achieved.network_fraction,
    )


def _weight_bytes_read(deployment: Deployment, num_tokens: int) -> dict[str, float]:
    """Weights one device reads for a batch: all it holds but the embedding, and of the experts those that are picked."""
    parts = weight_bytes_per_device(deployment)
    del parts["embedding"]
    config = deployment.config
    if config.n_routed_experts is not None:
        distinct = expected_distinct_experts(config.n_routed_experts, config.num_experts_per_tok, num_tokens)
        parts["routed_experts"] *= distinct / config.n_routed_experts
    return parts


def _network_s(deployment: Deployment, num_tokens: int, copies: int) -> float:
    """Time on the link of one device that sends `num_tokens`, latency left out."""
    config, count = deployment.config, deployment.cluster.count
    if count == 1:
        return 0.0
    if not deployment.is_expert_parallel:
        # Two sums over all devices per layer, each by reduce-scatter and all-gather.
        moved = num_tokens * config.hidden_size * BF16_BYTES * 2 * (count - 1) / count
        return 2 * config.num_hidden_layers * moved / deployment.link_bytes_per_s
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    transfer_us = all_to_all_time_us(
        num_tokens=num_tokens,
        hidden_size=config.hidden_size,
        num_experts_per_tok=copies,
        n_shared_experts=0,  # held by every device; the paper's own limit counts it as sent
        link_gb_per_s=deployment.link_bytes_per_s / 1e9,
    )
    return moe_layers * transfer_us * 1e-6
