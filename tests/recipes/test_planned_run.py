import json
from dataclasses import asdict

import pytest

from shoal.errors import ConfigError, DataError
from shoal.planner.counts import training_flops_per_token
from shoal.recipes.demo import demo_config
from shoal.recipes.planned_run import plan_run
from shoal.recipes.planning import is_run_directory
from tests.planner.test_calibration import calibration

STEPS = demo_config().pretraining.steps

MACHINE = {"processor": "made up", "num_cores": 2, "memory_bytes": 2**34}


@pytest.fixture
def run_dir(tmp_path):
    settings = {"recipe": "demo", **asdict(demo_config())}
    write(tmp_path / "config.json", {"machine": MACHINE, "settings": settings, **settings})
    write(
        tmp_path / "stages.json",
        {"pretrain": {"wall_s": 300.0, "energy_j": 7000.0, "energy_kind": "modelled", "done": True}},
    )
    line = {"stage": "pretrain", "step": STEPS, "tokens": 4_400_000, "peak_memory_bytes": 2_000, "loss": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    return tmp_path


def write(path, values):
    path.write_text(json.dumps(values), encoding="utf-8")


def test_predictions_stand_beside_measurements_with_their_errors(run_dir):
    found = {one.name: one for one in plan_run(run_dir, calibration()).outcomes}
    config = demo_config()
    step_s = calibration().training_step_s(config.model, config.batch_rows, config.row_tokens)
    assert found["training_s"].predicted == pytest.approx(STEPS * step_s) and found["training_s"].measured == 300.0
    assert found["training_s"].error_fraction == pytest.approx(STEPS * step_s / 300 - 1)
    assert found["training_tokens"].predicted == STEPS * 26 * 160
    assert found["training_flops"].measured == 4_400_000 * training_flops_per_token(config.model, 160)
    assert found["training_joules"].predicted == pytest.approx(STEPS * step_s * 24)
    assert found["peak_memory_bytes"].measured == 2_000


def test_without_a_calibration_it_says_so(run_dir):
    found = plan_run(run_dir, None)
    assert not found.is_calibrated and "--calibrate" in found.calibration
    assert all(one.predicted > 0 for one in found.outcomes)


def test_a_stage_that_has_not_ended_is_held_against_the_steps_it_has_reached(run_dir):
    write(run_dir / "stages.json", {})
    lines = [
        {
            "stage": "pretrain",
            "step": step,
            "tokens": step * 4000,
            "time_s": 1000.0 + step / 4,
            "peak_memory_bytes": 900,
        }
        for step in (5, 10, 100)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    made = plan_run(run_dir, calibration())
    found = {one.name: one for one in made.outcomes}
    assert (made.steps_reached, made.steps) == (100, STEPS)
    assert found["training_tokens"].predicted == 100 * 26 * 160 and found["training_tokens"].measured == 400_000
    assert found["training_s"].measured == pytest.approx(25.0)
    assert found["training_joules"].measured is None and found["training_joules"].error_fraction is None


def test_a_run_directory_without_metrics_is_named(run_dir):
    (run_dir / "metrics.jsonl").unlink()
    assert is_run_directory(str(run_dir))
    with pytest.raises(DataError, match=r"metrics.jsonl"):
        plan_run(run_dir, calibration())


@pytest.mark.parametrize("key, value", [("batch_rows", 0), ("row_tokens", "160"), ("pretraining", None), ("model", 3)])
def test_a_configuration_that_cannot_be_is_named(run_dir, key, value):
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    write(run_dir / "config.json", config | {key: value})
    with pytest.raises(ConfigError, match="does not describe a pretraining run"):
        plan_run(run_dir, calibration())
