"""DeepSeek's published day, to its published digits."""

from decimal import Decimal

import pytest

from shoal.planner.prices import price_at
from shoal.planner.published_day import (
    PUBLISHED_LOAD,
    PUBLISHED_START_UTC,
    not_recomputed,
    published_day,
    published_figures,
)
from shoal.planner.service import over_hit_rate

R1 = price_at("deepseek-reasoner", PUBLISHED_START_UTC)


@pytest.mark.parametrize("figure", published_figures(), ids=lambda figure: figure.name)
def test_published_serving_figures_are_recomputed(figure):
    assert figure.agrees, f"{figure.published} {figure.unit} published, {figure.ours} ours"
    assert figure.source and figure.formula


def test_the_published_day_closes_to_the_digit():
    cost, earned = published_day()
    assert cost.usd == 87_072
    assert (earned.hit_usd, earned.miss_usd, earned.output_usd) == (Decimal(47_880), Decimal(146_300), Decimal(367_920))
    assert earned.revenue_usd == 562_100
    assert earned.profit_over_cost_fraction == pytest.approx(5.4556, abs=1e-4)
    assert earned.profit_over_revenue_fraction == pytest.approx(0.845, abs=1e-3)
    assert cost.usd_per_million_input_tokens * 608e3 + cost.usd_per_million_output_tokens * 168e3 == pytest.approx(
        87_072
    )


def test_what_stays_open_is_said_in_words():
    ours = {one.figure: one.ours for one in not_recomputed()}
    assert ours["electricity of DeepSeek's day"].startswith("54 to 69 MWh, 1.2 to 1.5 J per output token")
    assert ours["real income of DeepSeek's day"].startswith("140,280 to 562,100 USD")
    assert all(one.why and one.published for one in not_recomputed())


def test_the_cache_cut_the_published_input_bill_by_42_percent():
    without, with_hits = over_hit_rate(R1, PUBLISHED_START_UTC, 0.06, [0.0, PUBLISHED_LOAD.hit_fraction])
    assert without.price_usd * 608e3 == pytest.approx(334_400)
    assert with_hits.price_usd * 608e3 == pytest.approx(194_180)
    assert with_hits.saved_fraction == pytest.approx(0.419, abs=5e-4)
    assert (without.saved_fraction, without.cost_usd) == (0, 0.06)
