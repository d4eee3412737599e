"""A run beside what a plan would have said of it: time, memory, operations and joules of its pretraining, with the errors.

The prediction sees what a person knows beforehand, the run's configuration and this machine's calibration; of what the run
wrote only the measured side is read. Without a calibration the prediction is the planner's default utilisation, and says so.
Evaluations, checkpoints and the time before the first step are not predicted: they are part of the error.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.config import ModelConfig
from shoal.errors import ConfigError, DataError
from shoal.planner.activations import recipe
from shoal.planner.calibration import Calibration
from shoal.planner.cost import cpu_assumptions
from shoal.planner.counts import training_flops_per_token
from shoal.planner.hardware import cpu_device
from shoal.planner.memory import TrainingPlan, training_memory
from shoal.planner.plan.question import CPU_UTILISATION
from shoal.report.brief import RunRecord


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One figure, foretold and found."""

    name: str
    label: str
    unit: str
    predicted: float
    measured: float | None
    """None where the run did not write it."""
    how: str
    """What the prediction rests on."""

    @property
    def error_fraction(self) -> float | None:
        """Predicted over measured, less one."""
        return None if not self.measured else self.predicted / self.measured - 1


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """The pretraining stage of a run."""

    run: str
    stage: str
    steps: int
    """That were asked for."""
    steps_reached: int
    """Fewer where the stage has not ended; both sides are then of these."""
    is_calibrated: bool
    calibration: str
    """When and where it was made; why there is none."""
    outcomes: tuple[Outcome, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, one object for each figure."""
        return {
            "run": self.run,
            "stage": self.stage,
            "steps": self.steps,
            "steps_reached": self.steps_reached,
            "is_calibrated": self.is_calibrated,
            "calibration": self.calibration,
            "figures": {
                one.name: {
                    "predicted": one.predicted,
                    "measured": one.measured,
                    "error_fraction": one.error_fraction,
                    "unit": one.unit,
                    "how": one.how,
                }
                for one in self.outcomes
            },
        }


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What the configuration of a run says about its pretraining."""

    model: ModelConfig
    batch_rows: int
    row_tokens: int
    steps: int
    accumulation: int

    @property
    def step_tokens(self) -> int:
        return self.batch_rows * self.row_tokens * self.accumulation

    @property
    def flops(self) -> float:
        return self.steps * self.step_tokens * training_flops_per_token(self.model, self.row_tokens)


def plan_run(run_dir: Path, calibration: Calibration | None) -> PlannedRun:
    """Foretell a run's pretraining and hold it against what was measured.

    Raises:
        DataError: no metrics yet, or no pretraining in it.
        ConfigError: its config.json cannot be read.
    """
    run = RunRecord.read(run_dir)
    if not run.pretrain_stages:
        raise DataError(f"{run_dir} has no pretraining in its metrics; name a run of shoal demo or shoal pretrain.")
    stage = run.pretrain_stages[0]
    asked = _asked(run)
    reached = asked.steps if run.stages.get(stage, {}).get("done") else _steps_reached(run, stage)
    so_far = replace(asked, steps=max(1, min(reached, asked.steps)))
    made = "none on this machine; measure with shoal plan --calibrate"
    if calibration is not None:
        machine = calibration.machine
        made = f"{calibration.made}, {machine.get('processor')}, {machine.get('num_cores')} cores"
    return PlannedRun(
        run=run.name,
        stage=stage,
        steps=asked.steps,
        steps_reached=so_far.steps,
        is_calibrated=calibration is not None,
        calibration=made,
        outcomes=tuple(_outcomes(run, stage, so_far, calibration)),
    )


@dataclass(frozen=True, kw_only=True)
class _Foretold:
    """Time and memory, and what they rest on."""

    seconds: float
    seconds_from: str
    memory_bytes: float
    memory_from: str


def _foretell(asked: _Asked, calibration: Calibration | None, run: RunRecord) -> _Foretold:
    model, rows, row_tokens = asked.model, asked.batch_rows, asked.row_tokens
    if calibration is not None:
        return _Foretold(
            seconds=asked.steps * asked.accumulation * calibration.training_step_s(model, rows, row_tokens),
            seconds_from="calibrated seconds per layer and operation x steps",
            memory_bytes=calibration.training_peak_bytes(model, rows, row_tokens, asked.steps),
            memory_from="bytes held at once x what the allocator was measured to keep, by the logarithm of the steps",
        )
    device = cpu_device(_cores(run), int(run.config.get("machine", {}).get("memory_bytes") or 2**33))
    plan = TrainingPlan(recipe=recipe("cpu"), micro_batch=rows, sequence_tokens=row_tokens, recompute="none")
    return _Foretold(
        seconds=asked.flops / (device.peak_flops("bf16") * CPU_UTILISATION.value),
        seconds_from=f"operations / ({CPU_UTILISATION.value:g} of {device.name}'s peak), {CPU_UTILISATION.source}",
        memory_bytes=float(training_memory(model, plan).total_bytes),
        memory_from="bytes held at once; the program itself and what its allocator keeps are not in it",
    )


def _outcomes(run: RunRecord, stage: str, asked: _Asked, calibration: Calibration | None) -> Iterator[Outcome]:
    foretold, facts, cores = _foretell(asked, calibration, run), run.stages.get(stage, {}), _cores(run)
    watts, done = cpu_assumptions(cores).power_w.value, _last(run, stage, "tokens")

    def outcome(name: str, label: str, unit: str, predicted: float, measured: float | None, how: str) -> Outcome:
        return Outcome(name=name, label=label, unit=unit, predicted=predicted, measured=measured, how=how)

    yield outcome(
        "training_s",
        "time",
        "s",
        foretold.seconds,
        _of(facts, "wall_s") or _time_so_far(run, stage),
        foretold.seconds_from,
    )
    yield outcome(
        "peak_memory_bytes",
        "peak memory of the process",
        "bytes",
        foretold.memory_bytes,
        _last(run, stage, "peak_memory_bytes"),
        foretold.memory_from,
    )
    yield outcome(
        "training_tokens",
        "tokens; rows that packing leaves short are the error",
        "tokens",
        asked.steps * asked.step_tokens,
        done,
        "steps x rows x tokens of a row",
    )
    yield outcome(
        "training_flops",
        "operations",
        "FLOP",
        asked.flops,
        None if done is None else done * training_flops_per_token(asked.model, asked.row_tokens),
        "tokens x training_flops_per_token; measured: of the tokens that were there",
    )
    yield outcome(
        "training_joules",
        f"energy ({facts.get('energy_kind', 'not recorded')})",
        "J",
        foretold.seconds * watts,
        _of(facts, "energy_j"),
        f"predicted time x {watts:g} W of {cores} busy cores",
    )


def _cores(run: RunRecord) -> int:
    return int(run.config.get("machine", {}).get("num_cores") or 1)


def _steps_reached(run: RunRecord, stage: str) -> int:
    return max((int(step) for step, _ in run.series(stage, "tokens")), default=1)


def _time_so_far(run: RunRecord, stage: str) -> float | None:
    """Of a stage that has not ended: the time between its first and last line, stretched to the steps before the first."""
    times = run.series(stage, "time_s")
    if len(times) < 2 or times[-1][0] == times[0][0]:
        return None
    (first, began_s), (last, ended_s) = times[0], times[-1]
    return (ended_s - began_s) * last / (last - first)


def _asked(run: RunRecord) -> _Asked:
    config = run.config
    training = config.get("pretraining") or config.get("training")
    try:
        if not isinstance(training, Mapping):
            raise ConfigError("no pretraining settings")
        return _Asked(
            model=run.model,
            batch_rows=_count(config, "batch_rows"),
            row_tokens=_count(config, "row_tokens"),
            steps=_count(training, "steps"),
            accumulation=_count(training, "accumulation"),
        )
    except (ConfigError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{run.name}/config.json does not describe a pretraining run ({error}); name a run of shoal demo or shoal pretrain."
        ) from None


def _count(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 1 <= value <= 2**40:
        raise ConfigError(f"{name}={value!r} must be a whole number, at least 1")
    return value


def _last(run: RunRecord, stage: str, key: str) -> float | None:
    found = run.series(stage, key)
    return float(found[-1][1]) if found else None


def _of(facts: Mapping[str, Any], key: str) -> float | None:
    value = facts.get(key)
    return float(value) if isinstance(value, int | float) and facts.get("done") else None
