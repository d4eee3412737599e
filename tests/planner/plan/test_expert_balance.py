import pytest

from shoal.errors import ConfigError
from shoal.planner.claims.serving import EPLB_LOADS
from shoal.planner.plan.expert_balance import balance_experts
from shoal.planner.plan.question import ask
from shoal.planner.plan.settings import parse_settings
from shoal.planner.published_models import rival
from shoal.presets import preset


def settled(*texts: str):
    return ask(rival("v3"), None, parse_settings(texts)).settings


def test_the_published_example_is_balanced_as_by_hand():
    config = preset("demo").replace(n_routed_experts=12, n_group=4, topk_group=4)
    sizes = settled("expert_devices=8", "expert_nodes=2", "spare_slots=4")
    found = balance_experts("example", config, sizes, EPLB_LOADS, "README")
    grouped = next(one for one in found.policies if one.policy == "hierarchical")
    assert found.num_slots == 16 and found.loads == "README"
    # Layer 0, by hand: 239 of 1033 before, 156 after; layer 1 has 1156 in all.
    assert grouped.mean_before == pytest.approx((239 * 8 / 1033 + _busiest(EPLB_LOADS[1]) * 8 / sum(EPLB_LOADS[1])) / 2)
    assert grouped.worst_after >= 156 * 8 / 1033 - 1e-12


def _busiest(loads) -> float:
    """Twelve experts in order on eight devices."""
    held = [0.0] * 8
    for expert, load in enumerate(loads):
        held[expert * 8 // 12] += load
    return max(held)


def test_copies_never_make_it_worse_and_global_is_at_least_as_even():
    found = balance_experts("v3", rival("v3").config, settled("expert_skew=1.2"), None, "")
    grouped, free = found.policies
    assert grouped.mean_after < grouped.mean_before and free.mean_after <= grouped.mean_after
    assert "made up" in found.loads and free.most_replicas > 1


def test_groups_that_do_not_divide_are_said_and_the_other_policy_still_answers():
    grouped, free = balance_experts("v3", rival("v3").config, settled("expert_nodes=16"), None, "").policies
    assert "do not divide" in grouped.why_not and grouped.mean_after == grouped.mean_before
    assert not free.why_not and free.mean_after < free.mean_before


def test_dense_models_and_loads_of_other_models_are_refused():
    with pytest.raises(ConfigError, match="no routed experts"):
        balance_experts("llama-2-7b", rival("llama-2-7b").config, settled(), None, "")
    with pytest.raises(ConfigError, match="loads are of 12 experts, v3 has 256"):
        balance_experts("v3", rival("v3").config, settled(), EPLB_LOADS, "README")
