"""How fast a deployment can be at most: the roofline of a pass, from its bytes and its operations.

A pass over the model reads the weights its tokens need, reads their cache, multiplies, and sends tokens between devices. None
of the four can be faster than the hardware's figure for it, and at best they overlap completely, so the pass takes at least
the longest of them: the roofline. It is a bound, never a forecast; `Achieved` scales it by what a measurement reached. DeepSeek's
production fleet of February 2025 reached 14.8k tokens/s per H800 node in decoding, under half of what this file gives at
most. A range is had by asking twice.

Which experts are read depends on the batch: E experts of which each of n tokens picks k leave one untouched with probability
(1 - k/E)^n, hence E (1 - (1 - k/E)^n) are read under even, independent routing. Real routing is less even and reads fewer.

Latency, host time, imbalance and activations' traffic are left out; all of them only slow.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.planner.checks import check_count, check_fraction
from shoal.planner.counts import decode_flops_per_token, parameter_counts, prefill_flops
from shoal.planner.deployment import BF16_BYTES, Deployment, weight_bytes_per_device
from shoal.planner.network import DecodeLimit, all_to_all_time_us, decode_limit


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
        check_count(name, value, low=1)
    check_count("num_tokens", num_tokens, low=0)
    if num_experts_per_tok > num_experts:
        raise ConfigError(f"num_experts_per_tok={num_experts_per_tok} exceeds num_experts={num_experts}.")
    if num_experts_per_tok == num_experts:
        return float(num_experts if num_tokens else 0)
    # expm1 and log1p keep one token at exactly k, where 1 - (1 - k/E) would round.
    return -num_experts * math.expm1(num_tokens * math.log1p(-num_experts_per_tok / num_experts))


def decode_pass(
    deployment: Deployment, *, num_sequences: int, context_tokens: int, tokens_per_sequence: int = 1
) -> Pass:
    """One step of decoding for a batch whose sequences all have `context_tokens` cached tokens.

    Args:
        num_sequences: of the whole cluster; whether their cache fits is `largest_batch`'s business.
        tokens_per_sequence: 2 verifies one drafted token. The cache is read once for all of them.
    """
    check_count("num_sequences", num_sequences, low=1)
    check_count("context_tokens", context_tokens, low=0)
    check_count("tokens_per_sequence", tokens_per_sequence, low=1)
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
    check_count("num_prompts", num_prompts, low=1)
    check_count("prompt_tokens", prompt_tokens, low=1)
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
    check_fraction("acceptance_fraction", acceptance_fraction)
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
