"""Training estimates: the published run of V3, laws of proportion, and figures that cannot be."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.planner.counts import parameter_counts, training_flops_per_token
from shoal.planner.energy import PowerModel
from shoal.planner.hardware import DEVICES, Cluster, device, parse_fit
from shoal.planner.published_models import RIVALS
from shoal.planner.training import (
    compare_training,
    dense_twin,
    estimate_training,
    implied_utilisation,
    same_loss_params,
    stated_utilisation,
    utilisation_of,
)
from shoal.presets import PRESETS, nano, v2_lite, v3

FAST = settings(max_examples=50, deadline=None, derandomize=True)
LLAMA = RIVALS["llama-3.1-405b"].config
assert LLAMA is not None
MODELS: dict[str, ModelConfig] = {**PRESETS, "llama-3.1-405b": LLAMA}


def test_v3_at_its_published_utilisation_takes_the_published_hours_and_dollars() -> None:
    # 2664K H800 hours, 5.328 million dollars, 54 days on 2048 GPUs (V3 table 1); 38.94 % (ISCA 2025 table 4).
    run = estimate_training(v3(), parse_fit("2048x h800"), tokens=14.8e12)
    assert run.device_hours == pytest.approx(2664e3, rel=0.005)
    assert run.cost.rent_usd == pytest.approx(5.328e6, rel=0.005)
    assert run.hours / 24 == pytest.approx(54.25, rel=0.005)
    assert run.tokens_per_s * 86400 == pytest.approx(272.8e9, rel=0.005)
    assert run.usd_per_trillion_tokens == pytest.approx(180e3 * 2, rel=0.005)
    assert run.board_kwh == pytest.approx(run.device_hours * 0.7)


def test_an_estimate_by_hand() -> None:
    cluster = parse_fit("4x a100")
    run = estimate_training(v2_lite(), cluster, tokens=1e9, utilisation=0.25, sequence_tokens=2048)
    flops = 1e9 * training_flops_per_token(v2_lite(), 2048)
    hours = flops / (4 * 312e12 * 0.25) / 3600
    assert run.total_flops == flops
    assert run.hours == pytest.approx(hours)
    assert run.device_hours == pytest.approx(4 * hours)
    assert run.cost.rent_usd == pytest.approx(4 * hours * 1.5)
    assert run.cost.kwh == pytest.approx(4 * hours * 0.8125 * 1.56)
    assert run.cost.kg_co2 == pytest.approx(run.cost.kwh * 0.48)
    assert run.cost.energy_kind == "modelled"


@FAST
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(sorted(DEVICES)),
    st.integers(1, 5000),
    st.floats(1e6, 1e14),
    st.floats(0.01, 0.5),
)
def test_tokens_are_proportional_to_money_and_devices_to_speed(
    name: str, device_name: str, count: int, tokens: float, utilisation: float
) -> None:
    config, cluster = MODELS[name], Cluster(device=DEVICES[device_name], count=count)
    run = estimate_training(config, cluster, tokens=tokens, utilisation=utilisation)
    twice = estimate_training(config, cluster, tokens=2 * tokens, utilisation=utilisation)
    wider = estimate_training(
        config, Cluster(device=cluster.device, count=2 * count), tokens=tokens, utilisation=utilisation
    )
    better = estimate_training(config, cluster, tokens=tokens, utilisation=2 * utilisation)
    for other, factor in ((twice, 2.0), (wider, 1.0), (better, 0.5)):
        assert other.device_hours == pytest.approx(factor * run.device_hours)
        assert other.cost.rent_usd == pytest.approx(factor * run.cost.rent_usd)
        assert other.cost.kwh == pytest.approx(factor * run.cost.kwh)
    assert wider.hours == pytest.approx(run.hours / 2)


@FAST
@given(st.sampled_from(sorted(MODELS)), st.floats(0.001, 0.99), st.integers(1, 8192), st.booleans())
def test_a_measured_speed_gives_back_the_utilisation_it_came_from(
    name: str, fraction: float, sequence_tokens: int, causal: bool
) -> None:
    config, cluster = MODELS[name], parse_fit("8x h200")
    run = estimate_training(
        config, cluster, tokens=1e9, utilisation=fraction, sequence_tokens=sequence_tokens, causal=causal
    )
    measured = utilisation_of(config, cluster, run.tokens_per_s, sequence_tokens=sequence_tokens, causal=causal)
    assert measured.value == pytest.approx(fraction)
    assert measured.source.startswith("measured: ")
    hours = implied_utilisation(
        config, cluster.device, device_hours=run.device_hours, phases=((1e9, sequence_tokens),), causal=causal
    )
    assert hours == pytest.approx(fraction)


def test_a_small_run_on_two_cores_is_planned_from_its_measured_speed() -> None:
    # 5.8 thousand tokens/s of the 10.3 M model (benchmarks/results/train.json): a minute of it foretells an hour.
    machine = parse_fit("2 cores, 24 GiB")
    speed = utilisation_of(nano(), machine, 5833, sequence_tokens=256)
    assert 0.3 < speed.value < 0.7
    run = estimate_training(nano(), machine, tokens=5833 * 3600, utilisation=speed, sequence_tokens=256)
    assert run.hours == pytest.approx(1)
    assert run.cost.joules == pytest.approx(3600 * 2 * PowerModel().watts_per_busy_core)
    assert run.board_kwh is None


def test_every_assumption_is_listed_with_its_source() -> None:
    run = estimate_training(v3(), parse_fit("8x h800"), tokens=1e12, utilisation=0.3)
    listed = run.assumptions()
    assert listed[0].name == "utilisation"
    assert listed[0].source == "stated by you"
    assert len({one.name for one in listed}) == 6
    assert all(one.source for one in listed)


def test_your_own_prices_replace_those_of_the_table() -> None:
    cluster = parse_fit("8x h800")
    defaults = cluster.cost_assumptions()
    free = estimate_training(v3(), cluster, tokens=1e12)
    dear = estimate_training(
        v3(),
        cluster,
        tokens=1e12,
        assumptions=type(defaults)(
            price_usd_per_h=defaults.price_usd_per_h.with_value(48.0, "mine"),
            power_w=defaults.power_w,
            pue=defaults.pue.with_value(1.1, "mine"),
            usd_per_kwh=defaults.usd_per_kwh,
            kg_co2_per_kwh=defaults.kg_co2_per_kwh,
        ),
    )
    assert dear.cost.rent_usd == pytest.approx(3 * free.cost.rent_usd)
    assert dear.cost.kwh == pytest.approx(free.cost.kwh * 1.1 / 1.56)


def test_mtp_costs_more_when_it_is_counted() -> None:
    plain, counted = (
        estimate_training(v3(), parse_fit("8x h800"), tokens=1e12, include_mtp=include) for include in (False, True)
    )
    assert 1.02 < counted.device_hours / plain.device_hours < 1.15


@pytest.mark.parametrize("name", ["v2_lite", "v2", "v3", "small", "demo"])
def test_a_dense_twin_has_as_many_parameters_and_multiplies_all_but_the_embedding(name: str) -> None:
    config = PRESETS[name]
    twin = dense_twin(config)
    ours, theirs = parameter_counts(config), parameter_counts(twin)
    assert theirs.total == pytest.approx(ours.total, abs=1.5 * config.hidden_size * config.num_hidden_layers + 1)
    assert theirs.active == theirs.total - theirs.embedding
    assert theirs.attention == ours.attention


def test_v3_trains_at_a_sixteenth_of_a_dense_model_of_its_size() -> None:
    pair = compare_training(v3(), dense_twin(v3()), parse_fit("2048x h800"), tokens=14.8e12)
    # (6 * 36.6 B + 30.7 G) against (6 * 670.1 B + 30.7 G) operations per token.
    assert pair.cost_fraction == pytest.approx(250.46 / (6 * 670.1 + 30.7), rel=1e-3)
    assert pair.flops_fraction == pytest.approx(pair.cost_fraction)


def test_a_pair_may_differ_in_tokens_and_utilisation() -> None:
    pair = compare_training(
        v3(),
        MODELS["llama-3.1-405b"],
        parse_fit("2048x h800"),
        tokens=14.8e12,
        second_tokens=15.6e12,
        second_utilisation=stated_utilisation(0.36, "implied by LLaMA-3.1-405B's hours"),
    )
    assert pair.cost_fraction == pytest.approx(pair.flops_fraction * 14.8 / 15.6 * 0.36 / 0.3894)
    assert pair.second.utilisation.source.startswith("implied")


def test_the_dense_model_of_the_same_loss_is_called_a_rule_of_thumb() -> None:
    params = same_loss_params(v3())
    assert params.value == pytest.approx((671.026e9 * 36.626e9) ** 0.5, rel=1e-4)
    assert "rule of thumb" in params.source
    twin = dense_twin(v3(), params.value)
    assert parameter_counts(twin).total == pytest.approx(params.value, rel=1e-4)
    with pytest.raises(ConfigError, match=r"params=1e\+09 are fewer than"):
        dense_twin(v3(), 1e9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 14.8}, r"14.8 trillion are 14.8e12"),
        ({"tokens": -1e12}, "it is in tokens"),
        ({"tokens": float("nan")}, "it is in tokens"),
        ({"tokens": 1e30}, "it is in tokens"),
        ({"utilisation": 39.0}, r"39 % is 0.39"),
        ({"utilisation": 0.0}, "utilisation=0 must be a fraction"),
        ({"utilisation": 390.0}, "utilisation=390 must be a fraction"),
        ({"utilisation": float("nan")}, "must be a fraction"),
        ({"sequence_tokens": 0}, "sequence_tokens=0"),
        ({"sequence_tokens": 4096.0}, "sequence_tokens=4096.0"),
    ],
)
def test_figures_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        estimate_training(v3(), parse_fit("8x h800"), **{"tokens": 1e12, **change})


def test_speeds_beyond_the_peak_are_refused() -> None:
    with pytest.raises(ConfigError, match="times what 8x h800 can compute"):
        utilisation_of(v3(), parse_fit("8x h800"), 1e6, sequence_tokens=4096)
    with pytest.raises(ConfigError, match="tokens_per_s=0"):
        utilisation_of(v3(), parse_fit("8x h800"), 0, sequence_tokens=4096)
    with pytest.raises(ConfigError, match="device_hours=-1"):
        implied_utilisation(v3(), device("h800"), device_hours=-1, phases=((1e12, 4096),))
