import dataclasses

import pytest

from shoal.errors import ConfigError
from shoal.planner.cost import cpu_assumptions, gpu_assumptions, training_cost, usd_per_million_tokens

V3_GPU_HOURS = 2_788_000


def test_v3_table_1_costs_5_576_million_dollars() -> None:
    cost = training_cost(V3_GPU_HOURS * 3600, gpu_assumptions(1))
    assert cost.rent_usd == pytest.approx(5.576e6)


def test_r1_costs_294_thousand_dollars() -> None:
    # 512 GPUs x (198 + 80) h and 5K h of data, R1 (Nature) supplementary table 7: 147K h.
    hours = 512 * (198 + 80) + 5000
    assert training_cost(hours * 3600, gpu_assumptions(1)).rent_usd == pytest.approx(294e3, rel=0.003)


def test_training_v3_takes_between_1_95_and_4_44_gwh_depending_on_what_is_counted() -> None:
    assumptions = gpu_assumptions(1)
    cards_only = dataclasses.replace(
        assumptions,
        power_w=assumptions.power_w.with_value(700, "card alone"),
        pue=assumptions.pue.with_value(1, "machine alone"),
    )
    whole_site = dataclasses.replace(assumptions, pue=assumptions.pue.with_value(1.25, "efficient site"))
    wall_s = V3_GPU_HOURS * 3600
    assert training_cost(wall_s, cards_only).kwh / 1e6 == pytest.approx(1.95, abs=0.005)
    assert training_cost(wall_s, whole_site).kwh / 1e6 == pytest.approx(4.44, abs=0.005)


def test_measured_joules_replace_assumed_power_and_keep_their_label() -> None:
    assumptions = cpu_assumptions(2)
    modelled = training_cost(1800, assumptions)
    assert (modelled.joules, modelled.energy_kind) == (1800 * 24, "modelled")
    measured = training_cost(1800, assumptions, joules=7.2e6, energy_kind="measured")
    assert measured.energy_kind == "measured"
    assert measured.kwh == pytest.approx(2 * 1.56)
    assert measured.electricity_usd == pytest.approx(2 * 1.56 * 0.128)
    assert measured.kg_co2 == pytest.approx(2 * 1.56 * 0.48)
    assert measured.rent_usd == modelled.rent_usd == pytest.approx(0.0504)


def test_every_assumption_has_a_unit_and_a_source() -> None:
    for assumption in (*cpu_assumptions(2).listed(), *gpu_assumptions(8).listed()):
        assert assumption.unit and len(assumption.source) > 10


def test_price_per_million_tokens() -> None:
    assert usd_per_million_tokens(0.5, 250_000) == 2.0


def test_impossible_assumptions_are_refused_with_the_value() -> None:
    assumptions = cpu_assumptions(2)
    with pytest.raises(ConfigError, match=r"pue=0\.9"):
        dataclasses.replace(assumptions, pue=assumptions.pue.with_value(0.9, "wishful"))
    with pytest.raises(ConfigError, match="machine power=-3"):
        assumptions.power_w.with_value(-3, "wishful")
    with pytest.raises(ConfigError, match="carbon intensity=nan"):
        assumptions.kg_co2_per_kwh.with_value(float("nan"), "unknown")
    with pytest.raises(ConfigError, match="num_cores=0"):
        cpu_assumptions(0)
    with pytest.raises(ConfigError, match="num_gpus=0"):
        gpu_assumptions(0)
    with pytest.raises(ConfigError, match="wall_s=-1"):
        training_cost(-1, assumptions)
    with pytest.raises(ConfigError, match="num_tokens=0"):
        usd_per_million_tokens(1.0, 0)
