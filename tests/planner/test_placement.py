import random
from collections.abc import Iterator
from itertools import combinations, combinations_with_replacement

import pytest

from shoal.errors import ConfigError
from shoal.planner.placement import Policy, balance, place_experts, replicate, synthetic_loads

# The worked example of github.com/deepseek-ai/EPLB, README.
README_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_SLOTS = (
    (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
)


def test_the_worked_example_of_the_published_balancer_is_reproduced_slot_by_slot() -> None:
    placement = place_experts(README_LOADS, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    assert placement.expert_of_slot == README_SLOTS
    assert placement.gpu_of_slot[1] == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7)
    assert placement.replica_counts[0] == (1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1)
    assert placement.slots_of_expert(0, 5) == (0, 2)


def test_balance_of_the_worked_example_equals_sums_by_hand() -> None:
    placement = place_experts(README_LOADS, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    result = balance(README_LOADS, placement)
    # Layer 0 sums to 1033. In order: GPU 6 has experts 9 and 10, 239. After: GPU 6 has expert 0 and half of expert 1, 156.
    assert result.before[0] == pytest.approx(239 * 8 / 1033)
    assert result.after[0] == pytest.approx(156 * 8 / 1033)


@pytest.mark.parametrize("policy", ["hierarchical", "global"])
@pytest.mark.parametrize("seed", range(6))
def test_every_expert_has_a_slot_and_every_gpu_equally_many(policy: Policy, seed: int) -> None:
    loads = synthetic_loads(3, 24, skew=1.2, seed=seed)
    placement = place_experts(loads, 40, 6, 2, 8, policy)
    for slots, gpus, counts in zip(placement.expert_of_slot, placement.gpu_of_slot, placement.replica_counts):
        assert set(slots) == set(range(24))
        assert [gpus.count(gpu) for gpu in range(8)] == [5] * 8
        assert list(counts) == [slots.count(expert) for expert in range(24)]


@pytest.mark.parametrize("seed", range(6))
def test_hierarchical_keeps_all_replicas_of_a_group_on_one_node(seed: int) -> None:
    loads = synthetic_loads(3, 24, skew=1.2, seed=seed)
    placement = place_experts(loads, 40, 6, 2, 8, "hierarchical")
    for slots, gpus in zip(placement.expert_of_slot, placement.gpu_of_slot):
        nodes_of_group: dict[int, set[int]] = {}
        for expert, gpu in zip(slots, gpus):
            nodes_of_group.setdefault(expert // 4, set()).add(placement.node_of_gpu(gpu))
        assert all(len(nodes) == 1 for nodes in nodes_of_group.values())


def test_placing_v3_as_served_evens_out_skewed_loads() -> None:
    # Prefill of open-infra-index day 6: 256 experts, 32 redundant, 4 nodes of 8 GPUs, 8 groups.
    loads = synthetic_loads(4, 256, skew=0.8, seed=1)
    hierarchical = balance(loads, place_experts(loads, 288, 8, 4, 32, "hierarchical"))
    globally = balance(loads, place_experts(loads, 288, 8, 4, 32, "global"))
    for before, after, after_global in zip(hierarchical.before, hierarchical.after, globally.after):
        assert after_global <= after < before
    assert globally.mean_after < 1.05 < 2 < globally.mean_before


@pytest.mark.parametrize("policy", ["hierarchical", "global"])
def test_placement_is_never_worse_than_experts_in_order_on_skewed_loads(policy: Policy) -> None:
    for seed in range(20):
        loads = synthetic_loads(2, 16, skew=0.5 + seed / 10, seed=seed)
        result = balance(loads, place_experts(loads, 24, 4, 2, 8, policy))
        assert all(after <= before for before, after in zip(result.before, result.after))


def test_greedy_replication_is_optimal_for_the_busiest_replica() -> None:
    for seed in range(20):
        generator = random.Random(seed)
        loads = [generator.uniform(1, 100) for _ in range(4)]
        best = min(
            max(load / (1 + extra.count(expert)) for expert, load in enumerate(loads))
            for extra in combinations_with_replacement(range(4), 5)
        )
        held = replicate(loads, 9)
        assert max(load / held.count(expert) for expert, load in enumerate(loads)) == pytest.approx(best)


def test_global_placement_is_within_a_quarter_of_brute_force_on_tiny_cases() -> None:
    # The bound is measured on these seeds, not proven.
    for seed in range(40):
        generator = random.Random(seed)
        loads = [generator.uniform(1, 100) for _ in range(4)]
        after = balance([loads], place_experts([loads], 6, 1, 1, 3, "global")).after[0]
        assert best_balance(loads, num_replicas=6, num_gpus=3) <= after + 1e-12
        assert after <= 1.25 * best_balance(loads, num_replicas=6, num_gpus=3)


def best_balance(loads: list[float], num_replicas: int, num_gpus: int) -> float:
    """Over all ways to replicate and to pack."""
    best = float("inf")
    for extra in combinations_with_replacement(range(len(loads)), num_replicas - len(loads)):
        held = [*range(len(loads)), *extra]
        share = [loads[expert] / held.count(expert) for expert in held]
        for packs in all_packings(tuple(range(num_replicas)), num_replicas // num_gpus):
            best = min(best, max(sum(share[item] for item in pack) for pack in packs))
    return best * num_gpus / sum(loads)


def all_packings(items: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    """All partitions of the items into packs of `size`."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for others in combinations(rest, size - 1):
        left = tuple(item for item in rest if item not in others)
        for packs in all_packings(left, size):
            yield [(first, *others), *packs]


def test_even_and_idle_loads_are_perfectly_balanced_before_and_after() -> None:
    for loads in ([[1.0] * 8], [[0.0] * 8]):
        result = balance(loads, place_experts(loads, 8, 2, 2, 4))
        assert result.before == result.after == (1.0,)


def test_synthetic_loads_follow_zipf_and_their_seed() -> None:
    loads = synthetic_loads(2, 5, skew=1.0, seed=3)
    harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5
    for layer in loads:
        assert sorted(layer, reverse=True) == pytest.approx([1 / rank / harmonic for rank in range(1, 6)])
    assert loads == synthetic_loads(2, 5, skew=1.0, seed=3)
    assert loads != synthetic_loads(2, 5, skew=1.0, seed=4)


def test_impossible_placements_are_refused_with_what_is_allowed() -> None:
    loads = synthetic_loads(2, 12, skew=1.0, seed=0)
    with pytest.raises(ConfigError, match=r"num_replicas=8 .* use 12 or more"):
        place_experts(loads, 8, 4, 2, 8)
    with pytest.raises(ConfigError, match=r"num_replicas=18 is not divisible by num_gpus=8; use 16 or 24"):
        place_experts(loads, 18, 4, 2, 8)
    with pytest.raises(ConfigError, match=r"num_gpus=8 is not divisible by num_nodes=3"):
        place_experts(loads, 16, 4, 3, 8)
    with pytest.raises(ConfigError, match=r"not divisible by num_groups=5; use 10 or 15"):
        place_experts(loads, 16, 5, 2, 8)
    with pytest.raises(ConfigError, match=r"num_groups=3 do not divide .* policy='global'"):
        place_experts(loads, 16, 3, 2, 8)
    with pytest.raises(ConfigError, match=r"unknown policy 'globl', did you mean 'global'"):
        place_experts(loads, 16, 4, 2, 8, "globl")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="load -1 of expert 1 in layer 0"):
        place_experts([[1, -1]], 2, 1, 1, 1)
    with pytest.raises(ConfigError, match="layer 1 has 1 loads"):
        place_experts([[1, 1], [1]], 2, 1, 1, 1)
    with pytest.raises(ConfigError, match="no loads"):
        place_experts([], 2, 1, 1, 1)
    with pytest.raises(ConfigError, match="do not fit a placement of 2 layers and 12 experts"):
        balance([[1.0] * 12], place_experts(loads, 16, 4, 2, 8))
    with pytest.raises(ConfigError, match="skew=-1"):
        synthetic_loads(1, 4, skew=-1, seed=0)
