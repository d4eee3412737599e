import math
from itertools import pairwise

import pytest

from shoal.errors import ConfigError
from shoal.planner.network import (
    FITTED_PRICES,
    Cabling,
    all_to_all_time_us,
    compare_topologies,
    decode_limit,
    dragonfly,
    multi_plane_fat_tree,
    published_topologies,
    slim_fly,
    three_layer_fat_tree,
    two_layer_fat_tree,
    unit_prices,
)

# "Insights into DeepSeek-V3" (ISCA 2025) table 3: endpoints, switches, links, cost in M$, cost per endpoint in k$.
TABLE_3 = {
    "FT2": (2_048, 96, 2_048, 9, 4.39),
    "MPFT": (16_384, 768, 16_384, 72, 4.39),
    "FT3": (65_536, 5_120, 131_072, 491, 7.5),
    "SF": (32_928, 1_568, 32_928, 146, 4.4),
    "DF": (261_632, 16_352, 384_272, 1_522, 5.8),
}


@pytest.mark.parametrize("name", TABLE_3)
def test_the_fifteen_counts_of_table_3_are_reproduced_exactly(name: str) -> None:
    topology = published_topologies()[name]
    assert (topology.endpoints, topology.switches, topology.links) == TABLE_3[name][:3]
    assert topology.endpoint_links == topology.endpoints
    assert topology.radix <= 64


@pytest.mark.parametrize("name", TABLE_3)
def test_the_fitted_prices_give_the_costs_of_table_3_within_one_percent(name: str) -> None:
    topology = published_topologies()[name]
    cost_musd, cost_kusd_per_endpoint = TABLE_3[name][3:]
    assert topology.cost_usd / 1e6 == pytest.approx(cost_musd, rel=0.01)
    assert topology.cost_usd_per_endpoint / 1e3 == pytest.approx(cost_kusd_per_endpoint, rel=0.01)


def test_no_prices_of_zero_or_more_meet_all_published_costs_within_their_rounding() -> None:
    # Per endpoint, e + s * switches + l * links: FT3 - FT2 gives s/32 + l, and (DF - FT2) / 0.46875 gives s/30 + l.
    # The second must not be below the first, whatever s >= 0; it is, even at the kindest ends of the roundings.
    ft2_low, ft2_high = 4.385e3, 4.395e3
    least_first = 490.5e6 / 65_536 - ft2_high
    most_second = (1_522.5e6 / 261_632 - ft2_low) / 0.46875
    assert most_second < least_first


def test_fitted_prices_are_called_a_fit_wherever_they_are_shown() -> None:
    assert all("fit" in price.source for price in FITTED_PRICES.listed())


@pytest.mark.parametrize("name", ["FT2", "MPFT", "FT3", "SF", "DF"])
def test_no_switch_has_more_links_than_ports(name: str) -> None:
    topology = published_topologies()[name]
    used_ports = 2 * topology.links + topology.endpoint_links
    assert used_ports <= topology.switches * topology.radix
    if name != "SF":  # all these fill every port
        assert used_ports == topology.switches * topology.radix


def test_two_layer_fat_tree_counts_equal_links_drawn_one_by_one() -> None:
    radix = 6
    leaves, spines = range(radix), range(radix // 2)
    drawn = [(leaf, spine) for leaf in leaves for spine in spines]
    tree = two_layer_fat_tree(radix)
    assert (tree.switches, tree.links) == (len(leaves) + len(spines), len(drawn))


def test_dragonfly_counts_equal_links_drawn_one_by_one() -> None:
    # The largest balanced dragonfly of h=2: 9 groups of 4 switches, one link between any two groups.
    local = sum(1 for _ in range(9) for a in range(4) for b in range(a))
    between = sum(1 for a in range(9) for b in range(a))
    fly = dragonfly(num_groups=9, switches_per_group=4, global_links_per_switch=2, endpoints_per_switch=2)
    assert fly.links == local + between
    assert fly.endpoints == 72


def test_slim_fly_of_five_is_the_hoffman_singleton_graph() -> None:
    fly = slim_fly(5)
    assert (fly.switches, fly.links, fly.radix) == (50, 175, 7 + 4)


def test_slim_fly_never_beats_the_moore_bound() -> None:
    for q in (3, 4, 5, 7, 8, 9, 11, 13, 16, 27, 32):
        fly = slim_fly(q)
        degree = 2 * fly.links // fly.switches
        assert fly.switches <= degree**2 + 1


def test_every_optical_link_has_two_transceivers_and_eight_fibres() -> None:
    tree = two_layer_fat_tree(64)
    assert (tree.transceivers, tree.fibres, tree.mpo_trunks) == (8_192, 32_768, 4_096)
    copper = two_layer_fat_tree(64, cabling=Cabling(has_optical_endpoints=False, links_per_trunk=12))
    assert (copper.transceivers, copper.fibres, copper.mpo_trunks) == (4_096, 16_384, math.ceil(2_048 / 12))


def test_cost_is_the_sum_of_its_parts() -> None:
    prices = unit_prices(
        switch_usd=1e6, endpoint_link_usd=1e3, link_usd=10, transceiver_usd=0.5, mpo_trunk_usd=0.01, source="test"
    )
    tree = two_layer_fat_tree(8, prices=prices)  # 12 switches, 32 endpoints, 32 links, 128 transceivers, 64 trunks
    assert tree.cost_usd == pytest.approx(12e6 + 32e3 + 320 + 64 + 0.64)


def test_planes_multiply_everything_and_change_no_price_per_endpoint() -> None:
    one, eight = two_layer_fat_tree(32), multi_plane_fat_tree(32, 8)
    assert (eight.endpoints, eight.switches, eight.links) == (8 * one.endpoints, 8 * one.switches, 8 * one.links)
    assert eight.cost_usd_per_endpoint == pytest.approx(one.cost_usd_per_endpoint)


def test_half_a_fat_tree_has_half_of_everything() -> None:
    whole, half = three_layer_fat_tree(16), three_layer_fat_tree(16, num_pods=8)
    assert (2 * half.endpoints, 2 * half.switches, 2 * half.links) == (whole.endpoints, whole.switches, whole.links)


def test_comparison_names_the_families_that_are_too_small() -> None:
    comparison = compare_topologies(10_000)
    assert comparison.too_small == (("two-layer fat tree", 2_048),)
    assert {topology.name for topology in comparison.topologies} == {
        "multi-plane fat tree (8 planes)",
        "three-layer fat tree",
        "Slim Fly",
        "dragonfly",
    }
    assert all(topology.endpoints >= 10_000 and topology.radix <= 64 for topology in comparison.topologies)
    assert all(a.cost_usd <= b.cost_usd for a, b in pairwise(comparison.topologies))


def test_comparison_at_the_published_sizes_rebuilds_the_published_fat_trees() -> None:
    published = published_topologies()
    for name in ("FT2", "MPFT", "FT3"):
        (found,) = compare_topologies(published[name].endpoints, names=[name]).topologies
        assert found == published[name]


def test_comparison_takes_a_slim_fly_that_exists_where_the_table_has_one_that_does_not() -> None:
    (fly,) = compare_topologies(32_928, names=["SF"]).topologies
    assert fly.switches == 2 * 29**2
    assert fly.radix == 64


def test_all_to_all_on_400g_limits_decoding_to_14_76_ms() -> None:
    time_us = all_to_all_time_us(num_tokens=32, hidden_size=7_000, num_experts_per_tok=8, link_gb_per_s=50)
    limit = decode_limit(time_us, num_layers=61)
    assert time_us == pytest.approx(120.96, abs=0.005)
    assert limit.tpot_ms == pytest.approx(14.76, abs=0.005)
    assert int(limit.tokens_per_s) == 67


def test_all_to_all_on_gb200_nvl72_limits_decoding_to_0_82_ms() -> None:
    time_us = all_to_all_time_us(num_tokens=32, hidden_size=7_000, num_experts_per_tok=8, link_gb_per_s=900)
    limit = decode_limit(time_us, num_layers=61)
    assert time_us == pytest.approx(6.72, abs=0.005)
    assert limit.tpot_ms == pytest.approx(0.82, abs=0.005)
    assert limit.tokens_per_s == pytest.approx(1_200, rel=0.02)


def test_the_true_hidden_size_of_v3_gives_15_11_ms() -> None:
    time_us = all_to_all_time_us(num_tokens=32, hidden_size=7_168, num_experts_per_tok=8, link_gb_per_s=50)
    assert decode_limit(time_us, num_layers=61).tpot_ms == pytest.approx(15.11, abs=0.005)


def test_impossible_networks_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"radix=63 is odd.*62 or 64"):
        two_layer_fat_tree(63)
    with pytest.raises(ConfigError, match=r"q=28 gives no Slim Fly.*27, 29"):
        slim_fly(28)
    with pytest.raises(ConfigError, match="q=30"):
        slim_fly(30, must_exist=False)
    with pytest.raises(ConfigError, match=r"num_groups=10 must be a whole number, from 2 to 9"):
        dragonfly(num_groups=10, switches_per_group=4, global_links_per_switch=2, endpoints_per_switch=2)
    with pytest.raises(ConfigError, match="without a partner"):
        dragonfly(num_groups=3, switches_per_group=3, global_links_per_switch=1, endpoints_per_switch=1)
    with pytest.raises(ConfigError, match=r"unknown topology 'torus'; use any of FT2, MPFT, FT3, SF, DF"):
        compare_topologies(100, names=["torus"])
    with pytest.raises(ConfigError, match="link price=-1"):
        unit_prices(switch_usd=1, endpoint_link_usd=1, link_usd=-1, source="test")
    with pytest.raises(ConfigError, match="planes=0"):
        multi_plane_fat_tree(64, 0)
    with pytest.raises(ConfigError, match=r"radix=64\.0 must be a whole number"):
        three_layer_fat_tree(64.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="link_gb_per_s=0"):
        all_to_all_time_us(num_tokens=32, hidden_size=7_168, num_experts_per_tok=8, link_gb_per_s=0)
    with pytest.raises(ConfigError, match="too small for a Slim Fly"):
        compare_topologies(10, radix=4)
