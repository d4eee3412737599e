import math

import pytest

from shoal.planner.calibration import load_calibration
from shoal.presets import preset
from shoal.recipes.measure_machine import _documents, _growth, _measure, save_calibration
from tests.planner.test_calibration import calibration


def test_growth_is_fitted_over_the_logarithm_of_the_steps():
    peaks = [(step, round(1e9 + 2e8 * math.log(step))) for step in range(1, 61)]
    found = _growth(preset("demo"), 26, 160, 250_000_000, peaks)
    assert found.first_bytes == pytest.approx(1e9, rel=1e-6) and found.per_e_fold_bytes == pytest.approx(2e8, rel=1e-6)


def test_memory_that_does_not_grow_has_no_slope_below_zero():
    assert _growth(preset("demo"), 26, 160, 0, [(step, 1000 - step) for step in range(1, 61)]).per_e_fold_bytes == 0


def test_documents_fill_the_steps_asked_for_and_fit_a_row(tmp_path):
    shards = _documents(tmp_path, 100, 64, 5000)
    assert shards.num_tokens >= 5000


def test_a_measured_point_is_a_step_of_the_real_loop(tmp_path):
    tiny = preset("demo").replace(hidden_size=16, num_hidden_layers=1, first_k_dense_replace=0)
    point, peaks = _measure(tmp_path, tiny, 2, 32, 4)
    assert point.tokens == 64 and 0 < point.step_s < 30
    assert [step for step, _ in peaks] == [1, 2, 3, 4] and all(peak > 1e7 for _, peak in peaks)


def test_what_is_saved_is_what_a_plan_loads(tmp_path):
    path = save_calibration(calibration(), tmp_path / "shoal" / "calibration.json")
    assert load_calibration(path) == calibration()
