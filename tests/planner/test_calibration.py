import dataclasses
import json

import pytest

from shoal.errors import ConfigError
from shoal.planner.calibration import (
    Calibration,
    DecodePoint,
    MemoryGrowth,
    TrainingPoint,
    calibration_from_json,
    decode_bytes,
    load_calibration,
    measured_utilisation,
    to_json,
)
from shoal.planner.counts import training_flops_per_token
from shoal.planner.hardware import parse_fit
from shoal.presets import preset

DEMO, NANO, MINI = preset("demo"), preset("nano"), preset("mini")
FIXED_S, RATE = 0.004, 50e9
PER_LAYER_S, PER_BYTE_S = 30e-6, 1e-10


def point(model, rows, row_tokens, rate):
    empty = TrainingPoint(model=model, batch_rows=rows, row_tokens=row_tokens, step_s=0.0)
    step_s = FIXED_S * empty.layers + empty.tokens * empty.flops_per_token / rate
    return dataclasses.replace(empty, step_s=step_s)


def decode_point(model):
    step_s = PER_LAYER_S * model.num_hidden_layers + PER_BYTE_S * decode_bytes(model, 128)
    return DecodePoint(model=model, context_tokens=128, step_s=step_s)


def calibration() -> Calibration:
    """A machine whose laws are known."""
    return Calibration(
        machine={"processor": "made up", "num_cores": 2},
        commit=None,
        made="2026-01-01",
        seed=0,
        training=(
            point(DEMO, 5, 160, RATE),
            point(DEMO, 26, 160, RATE),
            point(NANO, 1, 512, 2 * RATE),
            point(NANO, 4, 512, 2 * RATE),
        ),
        decoding=(decode_point(DEMO), decode_point(MINI)),
        memory=MemoryGrowth(
            model=DEMO, batch_rows=26, row_tokens=160, base_bytes=400, first_bytes=1000, per_e_fold_bytes=200
        ),
    )


def test_steps_of_the_measured_shapes_follow_the_laws_at_any_batch():
    for model, row_tokens, rate in ((DEMO, 160, RATE), (NANO, 512, 2 * RATE)):
        for rows in (1, 7, 40):
            expected = point(model, rows, row_tokens, rate).step_s
            assert calibration().training_step_s(model, rows, row_tokens) == pytest.approx(expected)


def test_shapes_beyond_the_measured_ones_take_the_nearer_rate():
    step_s = calibration().training_step_s(MINI, 2, 512)
    assert step_s == pytest.approx(point(MINI, 2, 512, 2 * RATE).step_s)


def test_decoding_is_taken_apart_into_layers_and_bytes():
    small = preset("small")
    expected = 1 / (PER_LAYER_S * small.num_hidden_layers + PER_BYTE_S * decode_bytes(small, 1000))
    assert calibration().decode_tokens_per_s(small, 1000) == pytest.approx(expected)


def test_memory_grows_with_the_logarithm_of_steps_and_in_proportion_to_what_is_held():
    measured = calibration()
    assert measured.training_peak_bytes(DEMO, 26, 160, 1) == pytest.approx(1000)
    assert measured.training_peak_bytes(DEMO, 26, 160, 1000) == pytest.approx(1000 + 200 * 6.907755)
    assert measured.training_peak_bytes(DEMO, 52, 160, 1) > 1400


def test_a_calibration_survives_its_file(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(to_json(calibration())), encoding="utf-8")
    assert load_calibration(path) == calibration_from_json(json.loads(json.dumps(to_json(calibration()))))
    assert load_calibration(path).training == calibration().training
    assert load_calibration(tmp_path / "none.json") is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99}', "[" * 100_000])
def test_a_damaged_calibration_says_how_to_make_a_new_one(tmp_path, content):
    path = tmp_path / "calibration.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="shoal plan --calibrate"):
        load_calibration(path)


def test_a_calibration_without_all_its_points_is_refused():
    values = to_json(calibration())
    values["decoding"] = values["decoding"][:1]
    with pytest.raises(ValueError, match="2 are needed"):
        calibration_from_json(json.loads(json.dumps(values)))


def test_this_machine_has_a_measured_utilisation_and_others_have_none():
    measured = calibration()
    found = measured_utilisation(measured, NANO, parse_fit("2 cores, 24 GiB"), 512)
    assert found is not None and "calibrated" in found.source
    flops_per_s = 4096 * training_flops_per_token(NANO, 512) / measured.training_step_s(NANO, 8, 512)
    assert found.value == pytest.approx(flops_per_s / 333e9, rel=0.01)
    for other in ("4 cores, 24 GiB", "h800", "2x rtx4090"):
        assert measured_utilisation(measured, NANO, parse_fit(other), 512) is None
