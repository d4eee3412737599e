"""Machines, bills and margins of a load, against hand computation and properties."""

from dataclasses import replace
from datetime import datetime, timezone
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ConfigError
from shoal.planner.hardware import DEVICES, Cluster
from shoal.planner.prices import price_at
from shoal.planner.published_day import PUBLISHED_LOAD, PUBLISHED_START_UTC
from shoal.planner.service import Load, margin, nodes_needed, over_hit_rate, service_cost

H800 = DEVICES["h800"]
R1 = price_at("deepseek-reasoner", PUBLISHED_START_UTC)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 10))
def test_a_higher_hit_rate_costs_neither_side_more(one, other, miss_cost):
    low, high = over_hit_rate(R1, PUBLISHED_START_UTC, miss_cost, sorted((one, other)))
    assert high.price_usd <= low.price_usd + 1e-12
    assert high.cost_usd <= low.cost_usd
    assert high.saved_fraction >= low.saved_fraction - 1e-12


def test_nodes_carry_their_load_and_hits_need_none_when_only_computing_counts():
    load = Load(hit_tokens=600, miss_tokens=400, output_tokens=300, period_s=10)
    computing = nodes_needed(load, input_tokens_per_s_per_node=4, output_tokens_per_s_per_node=6, counts_hits=False)
    assert (computing.prefill_nodes, computing.decode_nodes, computing.nodes) == (10, 5, 15)
    counting = nodes_needed(load, input_tokens_per_s_per_node=4, output_tokens_per_s_per_node=6, counts_hits=True)
    assert counting.prefill_nodes == 25


def test_a_bill_is_rent_and_joules_of_its_two_parts():
    load = Load(hit_tokens=0, miss_tokens=4 * 10**6, output_tokens=10**6, period_s=3600)
    node = Cluster(device=H800, count=8).cost_assumptions()
    node = replace(node, pue=node.pue.with_value(1.25, "test"))
    fleet = nodes_needed(load, input_tokens_per_s_per_node=1000, output_tokens_per_s_per_node=100, counts_hits=True)
    cost = service_cost(load, fleet, node)
    hours = 4e6 / 1000 / 3600, 1e6 / 100 / 3600
    assert cost.usd == pytest.approx(16 * sum(hours))
    assert cost.usd_per_million_input_tokens == pytest.approx(16 * hours[0] / 4)
    assert cost.usd_per_million_output_tokens == pytest.approx(16 * hours[1])
    assert cost.joules == pytest.approx(10_200 * 1.25 * 3600 * sum(hours))
    assert cost.joules_per_million_tokens == pytest.approx(cost.joules / 5)
    assert cost.joules_per_output_token == pytest.approx(cost.joules / 1e6)


def test_free_tokens_have_no_margin():
    nothing = margin(PUBLISHED_LOAD, _free(), datetime(2025, 3, 1, tzinfo=timezone.utc), 10.0)
    assert nothing.profit_over_cost_fraction == -1
    assert nothing.profit_over_revenue_fraction == float("-inf")


def _free():
    zero = Decimal(0)
    return replace(
        R1,
        hit_usd_per_mtok=zero,
        miss_usd_per_mtok=zero,
        output_usd_per_mtok=zero,
        off_peak_usd_per_mtok=(zero, zero, zero),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Load(hit_tokens=-1, miss_tokens=1, output_tokens=1), "hit_tokens=-1"),
        (lambda: Load(hit_tokens=0, miss_tokens=0, output_tokens=1), "at least one prompt token"),
        (lambda: Load(hit_tokens=0, miss_tokens=1, output_tokens=1, period_s=0), "period_s=0"),
        (
            lambda: nodes_needed(
                PUBLISHED_LOAD, input_tokens_per_s_per_node=0, output_tokens_per_s_per_node=1, counts_hits=True
            ),
            "input_tokens_per_s_per_node=0",
        ),
        (lambda: margin(PUBLISHED_LOAD, R1, PUBLISHED_START_UTC, 0), "cost_usd=0"),
        (lambda: over_hit_rate(R1, PUBLISHED_START_UTC, 1.0, [1.5]), "hit_fraction=1.5"),
        (lambda: over_hit_rate(R1, PUBLISHED_START_UTC, -1.0, [0.5]), "miss_cost_usd_per_million=-1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
