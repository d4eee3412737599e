"""A run beside what a plan would have said of it: time, memory, operations and joules of its pretraining, with the errors.

The prediction sees what a person knows beforehand, the run's configuration and this machine's calibration; of what the run
wrote only the measured side is read. Without a calibration the prediction is the planner's default utilisation, and says so.
Evaluations, checkpoints and the time before the first step are not predicted: they are part of the error.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    is_calibrated: bool
    calibration: str
    """When and where it was made; why there is none."""
    outcomes: tuple[Outcome, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, one object for each figure."""
        return {
            "run": self.run,
            "stage": self.stage,
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
    outcomes = tuple(_outcomes(run, stage, asked, calibration))
    made = "none on this machine; measure with shoal plan --calibrate"
    if calibration is not None:
        machine = calibration.machine
        made = f"{calibration.made}, {machine.get('processor')}, {machine.get('num_cores')} cores"
    return PlannedRun(
        run=run.name,
        stage=stage,
        is_calibrated=calibration is not None,
        calibration=made,
        outcomes=outcomes,
    )


def _outcomes(run: RunRecord, stage: str, asked: _Asked, calibration: Calibration | None) -> Iterator[Outcome]:
    model, row_tokens = asked.model, asked.row_tokens
    cores = int(run.config.get("machine", {}).get("num_cores") or 1)
    facts = run.stages.get(stage, {})
    tokens = asked.steps * asked.step_tokens
    flops = tokens * training_flops_per_token(model, row_tokens)
    done = _last(run, stage, "tokens")
    if calibration is not None:
        seconds = asked.steps * asked.accumulation * calibration.training_step_s(model, asked.batch_rows, row_tokens)
        time_from = "calibrated seconds per layer and operation x steps"
        memory = calibration.training_peak_bytes(model, asked.batch_rows, row_tokens, asked.steps)
        memory_from = "bytes held at once x what the allocator was measured to keep, by the logarithm of the steps"
    else:
        device = cpu_device(cores, int(run.config.get("machine", {}).get("memory_bytes") or 2**33))
        seconds = flops / (device.peak_flops("bf16") * CPU_UTILISATION.value)
        time_from = f"operations / ({CPU_UTILISATION.value:g} of {device.name}'s peak), {CPU_UTILISATION.source}"
        plan = TrainingPlan(
            recipe=recipe("cpu"), micro_batch=asked.batch_rows, sequence_tokens=row_tokens, recompute="none"
        )
        memory = float(training_memory(model, plan).total_bytes)
        memory_from = "bytes held at once; the program itself and what its allocator keeps are not in it"
    yield Outcome(
        name="training_s", label="time", unit="s", predicted=seconds, measured=_of(facts, "wall_s"), how=time_from
    )
    yield Outcome(
        name="peak_memory_bytes",
        label="peak memory of the process",
        unit="bytes",
        predicted=memory,
        measured=_last(run, stage, "peak_memory_bytes"),
        how=memory_from,
    )
    yield Outcome(
        name="training_tokens",
        label="tokens; rows that packing leaves short are the error",
        unit="tokens",
        predicted=tokens,
        measured=done,
        how="steps x rows x tokens of a row",
    )
    yield Outcome(
        name="training_flops",
        label="operations",
        unit="FLOP",
        predicted=flops,
        measured=None if done is None else done * training_flops_per_token(model, row_tokens),
        how="tokens x training_flops_per_token; measured: of the tokens that were there",
    )
    watts = cpu_assumptions(cores).power_w.value
    yield Outcome(
        name="training_joules",
        label=f"energy ({facts.get('energy_kind', 'not recorded')})",
        unit="J",
        predicted=seconds * watts,
        measured=_of(facts, "energy_j"),
        how=f"predicted time x {watts:g} W of {cores} busy cores",
    )


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
