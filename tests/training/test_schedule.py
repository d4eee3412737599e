import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ConfigError
from shoal.training.schedule import BatchRamp, Schedule, v3_schedule


def test_warm_up_is_linear_and_its_last_step_has_the_full_rate() -> None:
    schedule = Schedule(kind="constant", warmup_steps=4, total_steps=10)
    assert [schedule.multiplier(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_passes_its_middle_halfway_and_stays_at_its_end() -> None:
    schedule = Schedule(kind="cosine", warmup_steps=10, total_steps=110, min_fraction=0.1)
    assert schedule.multiplier(10) == 1.0
    assert schedule.multiplier(60) == pytest.approx(0.55)
    assert schedule.multiplier(110) == pytest.approx(0.1)
    assert schedule.multiplier(500) == pytest.approx(0.1)


def test_wsd_is_flat_and_then_falls_in_the_chosen_shape() -> None:
    values = {"kind": "wsd", "warmup_steps": 5, "total_steps": 100, "decay_fraction": 0.4, "min_fraction": 0.2}
    linear = Schedule(**values)
    root = Schedule(**values, decay_shape="one_minus_sqrt")
    assert {linear.multiplier(step) for step in range(5, 61)} == {1.0}
    assert linear.multiplier(70) == pytest.approx(0.2 + 0.8 * 0.75)
    assert root.multiplier(70) == pytest.approx(0.2 + 0.8 * 0.5)
    assert linear.multiplier(100) == root.multiplier(100) == pytest.approx(0.2)


def test_wsd_without_a_decay_stays_at_the_peak() -> None:
    assert Schedule(kind="wsd", total_steps=10, decay_fraction=0.0).multiplier(9) == 1.0


def test_v3_curve_has_the_published_rates_at_the_published_tokens() -> None:
    schedule = v3_schedule(14_800)
    rate = {tokens: 2.2e-4 * schedule.multiplier(tokens) for tokens in (999, 9_999, 12_150, 14_400, 14_700)}
    assert rate[999] == pytest.approx(1.1e-4)
    assert rate[9_999] == pytest.approx(2.2e-4)
    assert rate[12_150] == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert rate[14_400] == pytest.approx(2.2e-5)
    assert rate[14_700] == pytest.approx(7.3e-6)


@given(
    st.sampled_from(["constant", "cosine", "wsd"]),
    st.integers(0, 20),
    st.integers(40, 200),
    st.floats(0, 0.5),
    st.floats(0, 1),
)
def test_rate_rises_once_falls_once_and_stays_within_its_bounds(
    kind: Any, warmup: int, total: int, decay: float, least: float
) -> None:
    schedule = Schedule(kind=kind, warmup_steps=warmup, total_steps=total, decay_fraction=decay, min_fraction=least)
    rates = [schedule.multiplier(step) for step in range(total + 5)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert min(rates[warmup:]) >= least - 1e-12


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "step", "total_steps": 5}, "kind='step'"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"total_steps": 5, "warmup_steps": -1}, "warmup_steps=-1"),
        ({"total_steps": 5, "min_fraction": 1.5}, "min_fraction=1.5"),
        ({"total_steps": 5, "decay_fraction": math.nan}, "decay_fraction=nan"),
        ({"total_steps": 5, "decay_shape": "cubic"}, "decay_shape='cubic'"),
        ({"kind": "wsd", "total_steps": 10, "warmup_steps": 9}, "goes past step 8 of 10"),
        ({"kind": "cosine", "total_steps": 10, "warmup_steps": 11}, "warmup_steps=11"),
    ],
)
def test_impossible_schedules_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(**values)


def test_batch_grows_linearly_over_steps_in_whole_micro_batches() -> None:
    ramp = BatchRamp(start_rows=4, end_rows=16, rows_per_micro_batch=4, ramp_steps=6)
    assert [ramp.micro_batches(step) for step in (0, 2, 4, 6, 100)] == [1, 2, 3, 4, 4]
    assert ramp.rows(3) == 10


def test_batch_over_tokens_agrees_with_adding_up_the_tokens_of_every_step() -> None:
    ramp = BatchRamp(start_rows=3072, end_rows=15360, ramp_tokens=469e9, tokens_per_row=4096)
    tokens, step = 0.0, 0
    while tokens < 469e9:
        wanted = 3072 + (15360 - 3072) * tokens / 469e9
        assert ramp.rows(step) == pytest.approx(wanted, rel=1e-3)
        tokens += ramp.rows(step) * 4096
        step += 1
    assert ramp.rows(step + 5) == 15360


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start_rows": 8, "end_rows": 4, "ramp_steps": 5}, "end_rows=4"),
        ({"start_rows": 2, "end_rows": 4, "rows_per_micro_batch": 3, "ramp_steps": 5}, "rows_per_micro_batch=3"),
        ({"start_rows": 2, "end_rows": 4}, "either ramp_steps or ramp_tokens"),
        ({"start_rows": 2, "end_rows": 4, "ramp_steps": 0}, "ramp_steps=0"),
        ({"start_rows": 2, "end_rows": 4, "ramp_tokens": 1e6}, "tokens_per_row"),
    ],
)
def test_impossible_ramps_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchRamp(**values)
