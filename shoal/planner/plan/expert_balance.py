"""How evenly a model's experts load their devices, before and after the load balancer, from measured or made-up loads."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.planner.placement import POLICIES, Balance, balance, place_experts, synthetic_loads
from shoal.planner.plan.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Balanced:
    """One policy's answer."""

    policy: str
    mean_before: float
    """Busiest device over the mean, over layers; 1 is perfect, and a layer takes as long as its busiest device."""
    mean_after: float
    worst_after: float
    most_replicas: int
    """Of the busiest expert."""
    why_not: str = ""
    """Where the policy cannot be used; the figures are then those of doing nothing."""


@dataclass(frozen=True, kw_only=True)
class ExpertBalance:
    """Both policies on the same loads."""

    model: str
    loads: str
    """Where the loads are from."""
    num_experts: int
    num_slots: int
    num_devices: int
    num_nodes: int
    policies: tuple[Balanced, ...]


def balance_experts(
    name: str, config: ModelConfig | None, settings: Settings, loads_LE: Sequence[Sequence[float]] | None, source: str
) -> ExpertBalance:
    """Place experts by both policies.

    Args:
        loads_LE: measured; None makes Zipf loads of the settings' skew.
    Raises:
        ConfigError: a dense model, loads of another model, or numbers that do not divide.
    """
    if config is None or config.n_routed_experts is None:
        raise ConfigError(
            f"{name} has no routed experts that we know of, so there is nothing to place; name a mixture of experts."
        )
    layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    experts, skew = config.n_routed_experts, settings.value("expert_skew")
    devices, nodes = settings.whole("expert_devices"), settings.whole("expert_nodes")
    loads = loads_LE or synthetic_loads(layers, experts, skew, seed=0)
    if len(loads[0]) != experts:
        raise ConfigError(
            f"the loads are of {len(loads[0])} experts, {name} has {experts}; use loads of the same model."
        )
    slots = -(-(experts + settings.whole("spare_slots")) // devices) * devices
    return ExpertBalance(
        model=name,
        loads=source if loads_LE else f"made up: Zipf with skew {skew:g}, seed 0",
        num_experts=experts,
        num_slots=slots,
        num_devices=devices,
        num_nodes=nodes,
        policies=tuple(_placed(policy, loads, slots, config.n_group, nodes, devices) for policy in POLICIES),
    )


def _placed(
    policy: str, loads: Sequence[Sequence[float]], slots: int, groups: int, nodes: int, devices: int
) -> Balanced:
    if policy == "hierarchical" and groups % nodes:
        why = f"{groups} expert groups do not divide over {nodes} nodes"
        plain = balance(loads, place_experts(loads, slots, 1, nodes, devices, "global"))
        return Balanced(
            policy=policy,
            mean_before=plain.mean_before,
            mean_after=plain.mean_before,
            worst_after=max(plain.before),
            most_replicas=1,
            why_not=why,
        )
    placement = place_experts(loads, slots, groups, nodes, devices, "global" if policy == "global" else "hierarchical")
    found: Balance = balance(loads, placement)
    return Balanced(
        policy=policy,
        mean_before=found.mean_before,
        mean_after=found.mean_after,
        worst_after=max(found.after),
        most_replicas=max(max(counts) for counts in placement.replica_counts),
    )
