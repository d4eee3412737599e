"""Which GPU holds which expert: DeepSeek's expert-parallel load balancer (EPLB) in plain Python.

Experts are not asked for equally often, and a layer waits for its busiest GPU. EPLB gives the busy ones further copies
(*replicas*), which share their expert's tokens evenly, and spreads all copies so that GPUs get the same number of slots and
nearly the same load. It runs on measured loads every few minutes and is no part of the model: outputs do not change.

The two policies of the published code (github.com/deepseek-ai/EPLB, README; DeepSeek-V3 §3.4):

- *hierarchical* keeps each expert group on one node, so that group-limited routing sends a token to few nodes: groups are
  packed onto nodes, experts replicated within their node, replicas packed onto the node's GPUs. Meant for prefilling, where
  nodes are few;
- *global* forgets groups and nodes: replicate over all experts, pack over all GPUs. Meant for decoding.

Both rest on two greedy rules, largest first into the lightest pack that still has room, and the next replica to the expert
with the largest load per replica. Ties go to the lower index, which reproduces the README's worked example slot by slot.
Greedy is not optimal; `tests/planner/test_placement.py` holds it against brute force on tiny cases.

Differs from the published code: where groups do not divide over the nodes it silently turns global. Here the policy is
named and such a wish is refused. Loads are Python floats, not float32, so ties by rounding may fall otherwise.
"""

import heapq
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.errors import ConfigError, did_you_mean
from shoal.planner.checks import check_count

Policy = Literal["hierarchical", "global"]
POLICIES: tuple[Policy, ...] = ("hierarchical", "global")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the experts of every layer lie. A slot is room for one expert's weights on one GPU."""

    num_gpus: int
    num_nodes: int
    expert_of_slot: tuple[tuple[int, ...], ...]
    """Per layer, per slot; slots are numbered GPU by GPU (EPLB's `phy2log`)."""
    gpu_of_slot: tuple[tuple[int, ...], ...]
    """Per layer, per slot; the same for all layers, as all GPUs have equally many slots."""
    replica_counts: tuple[tuple[int, ...], ...]
    """Per layer, per expert, at least 1 (EPLB's `logcnt`)."""

    def slots_of_expert(self, layer: int, expert: int) -> tuple[int, ...]:
        """Where a router may send this expert's tokens, ascending (a row of EPLB's `log2phy`)."""
        return tuple(slot for slot, held in enumerate(self.expert_of_slot[layer]) if held == expert)

    def node_of_gpu(self, gpu: int) -> int:
        """GPUs are numbered node by node."""
        return gpu * self.num_nodes // self.num_gpus


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Busiest GPU over mean GPU, per layer; 1 is perfect. A layer's time goes with it."""

    before: tuple[float, ...]
    """One copy of each expert, in order; GPUs differ by one expert where the numbers do not divide."""
    after: tuple[float, ...]

    @property
    def mean_before(self) -> float:
        """Over layers: what a token meets on its way through all of them."""
        return sum(self.before) / len(self.before)

    @property
    def mean_after(self) -> float:
        """Over layers."""
        return sum(self.after) / len(self.after)


def place_experts(
    loads_LE: Sequence[Sequence[float]],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    policy: Policy = "hierarchical",
) -> Placement:
    """Choose replicas and their GPUs from measured loads.

    Args:
        loads_LE: tokens, or any measure of work, per layer and expert.
        num_replicas: slots over all GPUs, at least one for each expert.
        num_groups: of equally many consecutive experts (`n_group`); the global policy has no use for them.
    """
    num_experts = _check_loads(loads_LE)
    _check_sizes(num_experts, num_replicas, num_groups, num_nodes, num_gpus, policy)
    groups, nodes = (num_groups, num_nodes) if policy == "hierarchical" else (1, 1)
    layers = [_place_layer(load_E, num_replicas, groups, nodes, num_gpus) for load_E in loads_LE]
    gpu_of_slot = tuple(slot // (num_replicas // num_gpus) for slot in range(num_replicas))
    return Placement(
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        expert_of_slot=tuple(layers),
        gpu_of_slot=tuple(gpu_of_slot for _ in layers),
        replica_counts=tuple(_counts(slots, num_experts) for slots in layers),
    )


def balance(loads_LE: Sequence[Sequence[float]], placement: Placement) -> Balance:
    """How much the placement evens out; with loads other than those it was made from, how well it keeps."""
    num_experts = _check_loads(loads_LE)
    expected = (len(placement.replica_counts), len(placement.replica_counts[0]))
    if (len(loads_LE), num_experts) != expected:
        raise ConfigError(
            f"loads of {len(loads_LE)} layers and {num_experts} experts do not fit a placement of {expected[0]} layers and "
            f"{expected[1]} experts; use loads of the same model."
        )
    before, after = [], []
    for layer, load_E in enumerate(loads_LE):
        in_order = [0.0] * placement.num_gpus
        for expert, load in enumerate(load_E):
            in_order[expert * placement.num_gpus // num_experts] += load
        placed = [0.0] * placement.num_gpus
        for expert, gpu in zip(placement.expert_of_slot[layer], placement.gpu_of_slot[layer], strict=True):
            placed[gpu] += load_E[expert] / placement.replica_counts[layer][expert]
        before.append(_max_over_mean(in_order))
        after.append(_max_over_mean(placed))
    return Balance(before=tuple(before), after=tuple(after))


def synthetic_loads(num_layers: int, num_experts: int, skew: float, seed: int) -> list[list[float]]:
    """Zipf loads to try a placement on: the r-th busiest expert gets a share in proportion to r^-skew.

    Args:
        skew: 0 is even, 1 is Zipf's law; each layer shuffles which expert is busy.
    Returns:
        Shares of a layer's tokens, each layer summing to 1.
    """
    check_count("num_layers", num_layers)
    check_count("num_experts", num_experts)
    if not 0 <= skew <= 10:
        raise ConfigError(f"skew={skew} must be from 0 (even) to 10.")
    generator = random.Random(seed)
    weights = [rank**-skew for rank in range(1, num_experts + 1)]
    total = sum(weights)
    layers = []
    for _ in range(num_layers):
        shares = [weight / total for weight in weights]
        generator.shuffle(shares)
        layers.append(shares)
    return layers


def pack_evenly(loads: Sequence[float], num_packs: int) -> list[list[int]]:
    """Indices of the items of each pack: largest first into the lightest pack with room, equally many in each."""
    room = len(loads) // num_packs
    if room == 1:  # any order is as good; this one moves nothing
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    lightest = [(0.0, pack) for pack in range(num_packs)]  # a heap, so ties go to the lower index
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        total, pack = lightest[0]
        packs[pack].append(item)
        if len(packs[pack]) < room:
            heapq.heapreplace(lightest, (total + loads[item], pack))
        else:
            heapq.heappop(lightest)
    return packs


def replicate(loads: Sequence[float], num_replicas: int) -> list[int]:
    """Expert of each replica: each expert once, in order, then the one with the largest load per replica again."""
    experts = list(range(len(loads)))
    counts = [1] * len(loads)
    busiest = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(busiest)
    while len(experts) < num_replicas:
        expert = busiest[0][1]
        counts[expert] += 1
        experts.append(expert)
        heapq.heapreplace(busiest, (-loads[expert] / counts[expert], expert))
    return experts


def _place_layer(
    load_E: Sequence[float], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[int, ...]:
    group_size = len(load_E) // num_groups
    members = [range(group * group_size, (group + 1) * group_size) for group in range(num_groups)]
    slots: list[int] = []
    for groups in pack_evenly([sum(load_E[expert] for expert in group) for group in members], num_nodes):
        experts = [expert for group in groups for expert in members[group]]
        held = [experts[i] for i in replicate([load_E[expert] for expert in experts], num_replicas // num_nodes)]
        copies = Counter(held)
        share = [load_E[expert] / copies[expert] for expert in held]
        slots += [held[i] for pack in pack_evenly(share, num_gpus // num_nodes) for i in pack]
    return tuple(slots)


def _counts(slots: Sequence[int], num_experts: int) -> tuple[int, ...]:
    copies = Counter(slots)
    return tuple(copies[expert] for expert in range(num_experts))


def _max_over_mean(loads: Sequence[float]) -> float:
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def _check_loads(loads_LE: Sequence[Sequence[float]]) -> int:
    """Number of experts."""
    if not loads_LE or not loads_LE[0]:
        raise ConfigError("no loads; give at least one layer with at least one expert.")
    num_experts = len(loads_LE[0])
    for layer, load_E in enumerate(loads_LE):
        if len(load_E) != num_experts:
            raise ConfigError(
                f"layer {layer} has {len(load_E)} loads and layer 0 has {num_experts}; give equally many."
            )
        for expert, load in enumerate(load_E):
            if not 0 <= load < math.inf:
                raise ConfigError(f"load {load} of expert {expert} in layer {layer} must be zero or a positive number.")
    return num_experts


def _check_sizes(
    num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, policy: str
) -> None:
    if policy not in POLICIES:
        raise ConfigError(f"unknown policy {policy!r}{did_you_mean(policy, POLICIES)}; use {' or '.join(POLICIES)}.")
    for name, value in (
        ("num_replicas", num_replicas),
        ("num_groups", num_groups),
        ("num_nodes", num_nodes),
        ("num_gpus", num_gpus),
    ):
        check_count(name, value)
    if num_replicas < num_experts:
        raise ConfigError(
            f"num_replicas={num_replicas} leaves some of the {num_experts} experts without a slot; use {num_experts} or more."
        )
    _check_divides("num_replicas", num_replicas, "num_gpus", num_gpus)
    _check_divides("num_gpus", num_gpus, "num_nodes", num_nodes)
    if policy == "hierarchical":
        _check_divides("the number of experts", num_experts, "num_groups", num_groups)
        if num_groups % num_nodes:
            raise ConfigError(
                f"num_groups={num_groups} do not divide over num_nodes={num_nodes}, so a group cannot stay on one node; use "
                "policy='global' or another number of nodes."
            )


def _check_divides(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        below, above = value // divisor * divisor, -(-value // divisor) * divisor
        use = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(f"{name}={value} is not divisible by {divisor_name}={divisor}; use {use}.")
