"""The training loop that every supervised stage runs in: pretraining and fine-tuning differ only in data and config.

A step reads a batch, moves the model (`step.train_step`), writes a metrics line, and from time to time evaluates and
saves. Everything that decides the next step (weights, optimizer moments, loader position, random states) is in the
checkpoint, so a run killed at any moment continues to the same weights, bit for bit.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from shoal.device import peak_memory_bytes
from shoal.errors import ConfigError
from shoal.log import MetricsWriter, duration, progress_bar, say
from shoal.model.layers import compute_dtype, set_compute_dtype, set_fp8
from shoal.model.load_balance import max_violation
from shoal.model.mla import set_recompute
from shoal.model.transformer import Transformer
from shoal.quant.fp8_recipe import Fp8Recipe
from shoal.text.packing import Batch
from shoal.training.evaluate import Evaluation
from shoal.training.loss import LossWeights
from shoal.training.optimizer import OptimizerConfig, OptimizerSet
from shoal.training.schedule import BatchRamp, Schedule
from shoal.training.state import extra_tensors, restore_training_state, save_training_state
from shoal.training.step import StepResult, train_step

SPEED_PROBE_STEPS = 3
"""Steps timed before the estimate is printed."""

Precision = Literal["auto", "fp32", "bf16", "fp8"]


class BatchSource(Protocol):
    """What the loop needs of a loader."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One stage of training."""

    steps: int
    accumulation: int = 1
    """Micro-batches of the loader's size per optimizer step."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: Schedule
    batch_ramp: BatchRamp | None = None
    """When given, decides the micro-batches per step instead of `accumulation`."""
    weights: LossWeights = field(default_factory=LossWeights)
    bias_speed: float = 1e-3
    """Step of the balance bias (gamma); published 0.001, larger for short runs."""
    bias_freeze_fraction: float = 0.0
    """Share of the last steps in which the bias stands still (published: the last 500B of 14.8T tokens)."""
    precision: Precision = "auto"
    """Of matrix products; "auto" takes bf16 where the processor multiplies it faster."""
    fp8: Fp8Recipe = field(default_factory=Fp8Recipe)
    """Switches of precision "fp8"; emulated where the device has no FP8 units."""
    recompute: bool = False
    """Keep only the latents of latent attention for backward: less memory, its norms, up projections and core twice."""
    compile: bool = False
    """Compile the decoder layers with torch.compile; pays on long runs."""
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    """0 evaluates at the end only."""
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulation < 1 or self.log_every < 1 or self.checkpoint_every < 1:
            raise ConfigError("steps, accumulation, log_every and checkpoint_every must be at least 1.")
        if not 0 <= self.bias_freeze_fraction <= 1 or self.bias_speed < 0:
            raise ConfigError("bias_freeze_fraction must be in [0, 1] and bias_speed not negative.")
        if self.precision not in ("auto", "fp32", "bf16", "fp8"):
            raise ConfigError(f"precision={self.precision!r} is unknown; use 'auto', 'fp32', 'bf16' or 'fp8'.")


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a stage ended."""

    steps: int
    tokens: int
    wall_s: float
    """This process only; a resumed run adds its parts in the metrics."""
    last_loss: float | None
    skipped_steps: int
    evaluation: Evaluation | None


def train(
    model: Transformer,
    config: TrainingConfig,
    loader: BatchSource,
    run_dir: Path,
    *,
    stage: str = "pretrain",
    evaluate: Callable[[], Evaluation] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> TrainingResult:
    """Run one stage to its end, from its newest checkpoint when there is one.

    Args:
        evaluate: held-out evaluation, called every `evaluate_every` steps and at the end.
        after_step: called with the number of finished steps; a recipe samples from the model here.
    Raises:
        CheckpointError: the run directory holds a checkpoint of another configuration.
    """
    return _Training(model, config, loader, run_dir, stage, evaluate, after_step).run()


class _Training:
    """The state of one running stage."""

    def __init__(
        self,
        model: Transformer,
        config: TrainingConfig,
        loader: BatchSource,
        run_dir: Path,
        stage: str,
        evaluate: Callable[[], Evaluation] | None,
        after_step: Callable[[int], None] | None,
    ) -> None:
        self.model, self.config, self.loader, self.stage = model, config, loader, stage
        self.evaluate, self.after_step = evaluate, after_step
        self.optimizers = OptimizerSet(model, config.optimizer)
        self.checkpoint_dir = run_dir / "checkpoints" / stage
        self.metrics = MetricsWriter(run_dir / "metrics.jsonl")
        self.step_done, self.tokens, self.skipped = 0, 0, 0
        self.total_count_LE: torch.Tensor | None = None
        self.last_loss: float | None = None
        self.identity = json.loads(
            json.dumps({"model": model.config.to_dict(), "training": dataclasses.asdict(config)})
        )

    def run(self) -> TrainingResult:
        """Train, then evaluate once more."""
        device = self.model.embed_tokens.weight.device
        set_compute_dtype(self.model, compute_dtype(self.config.precision, device))
        set_fp8(self.model, self.config.fp8 if self.config.precision == "fp8" else None)
        set_recompute(self.model, self.config.recompute)
        if self.config.compile:
            for layer in self.model.layers:
                layer.compile()
        torch.manual_seed(self.config.seed)
        self._resume()
        started_s = time.monotonic()
        first_step = self.step_done
        self.model.train()
        batches = iter(self.loader)
        with progress_bar(self.stage, self.config.steps) as bar:
            bar.advance(self.step_done)
            while self.step_done < self.config.steps:
                self._one_step(batches, bar, started_s, first_step)
        self.model.eval()
        evaluation = self.evaluate() if self.evaluate else None
        if evaluation and first_step < self.config.steps:
            self._write_evaluation(evaluation)
        return TrainingResult(
            steps=self.step_done,
            tokens=self.tokens,
            wall_s=time.monotonic() - started_s,
            last_loss=self.last_loss,
            skipped_steps=self.skipped,
            evaluation=evaluation,
        )

    def _one_step(self, batches: Iterator[Batch], bar: Any, started_s: float, first_step: int) -> None:
        step_started_s = time.monotonic()
        step = self.step_done
        rate = self.config.schedule.multiplier(step)
        self.optimizers.set_rate(rate)
        ramp = self.config.batch_ramp
        count = ramp.micro_batches(step) if ramp else self.config.accumulation
        frozen = step >= self.config.steps * (1 - self.config.bias_freeze_fraction)
        micro_batches = [next(batches) for _ in range(count)]
        result = train_step(
            self.model,
            self.optimizers,
            micro_batches,
            weights=self.config.weights,
            bias_speed=0.0 if frozen else self.config.bias_speed,
        )
        self._account(result)
        self.step_done += 1
        note = f"loss {self.last_loss:.3f}" if self.last_loss is not None else "no labels"
        bar.advance(1, note)
        if self.step_done - first_step == SPEED_PROBE_STEPS:
            per_step_s = (time.monotonic() - started_s) / SPEED_PROBE_STEPS
            left = self.config.steps - self.step_done
            say(f"{self.stage}: {self.config.steps} steps, about {duration(per_step_s * left)} to go")
        if self.step_done % self.config.log_every == 0 or self.step_done == self.config.steps:
            self._write_metrics(result, rate, time.monotonic() - step_started_s)
        if self.config.evaluate_every and self.step_done % self.config.evaluate_every == 0 and self.evaluate:
            self.model.eval()
            self._write_evaluation(self.evaluate())
            self.model.train()
        if self.after_step:
            self.after_step(self.step_done)
        if self.step_done % self.config.checkpoint_every == 0 or self.step_done == self.config.steps:
            self._save()

    def _account(self, result: StepResult) -> None:
        self.tokens += result.num_tokens
        if result.num_labels:
            self.last_loss = result.loss_sum / result.num_labels
        if result.grad_norm is None:
            self.skipped += 1
            why = "no labels in the batch" if not result.num_labels else "gradients are not finite"
            say(f"{self.stage}: step {self.step_done + 1} skipped, {why} ({self.skipped} skipped so far)")
        if result.count_LE.numel():
            total = self.total_count_LE
            self.total_count_LE = result.count_LE if total is None else total + result.count_LE

    def _write_metrics(self, result: StepResult, rate: float, step_s: float) -> None:
        values: dict[str, Any] = result.metrics()
        if self.total_count_LE is not None:
            load_LE = self.total_count_LE.double()
            values["max_vio_global"] = float(max_violation(self.total_count_LE).max())
            values["expert_load"] = (load_LE / load_LE.sum(dim=-1, keepdim=True)).tolist()
        self.metrics.write(
            self.stage,
            self.step_done,
            **values,
            learning_rate=self.config.optimizer.learning_rate * rate,
            tokens_per_s=result.num_tokens / step_s,
            tokens=self.tokens,
            skipped_steps=self.skipped,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def _write_evaluation(self, evaluation: Evaluation) -> None:
        values = {f"eval_{name}": value for name, value in dataclasses.asdict(evaluation).items()}
        self.metrics.write(self.stage, self.step_done, **values)

    def _save(self) -> None:
        extra = {
            "loader": self.loader.state_dict(),
            "tokens": self.tokens,
            "skipped": self.skipped,
            "last_loss": self.last_loss,
        }
        save_training_state(
            self.checkpoint_dir,
            self.step_done,
            self.model,
            self.optimizers,
            identity=self.identity,
            extra=extra,
            extra_tensors=None if self.total_count_LE is None else {"total_count_LE": self.total_count_LE},
        )

    def _resume(self) -> None:
        found = restore_training_state(self.checkpoint_dir, self.model, self.optimizers, identity=self.identity)
        if found is None:
            return
        extra = found.state["extra"]
        self.loader.load_state_dict(extra["loader"])
        self.total_count_LE = extra_tensors(found).get("total_count_LE")
        self.step_done, self.tokens = found.step, extra["tokens"]
        self.skipped, self.last_loss = extra["skipped"], extra["last_loss"]
        self.metrics.rewind(self.stage, self.step_done)
        if self.step_done < self.config.steps:
            say(f"{self.stage}: resuming after step {self.step_done} of {self.config.steps}")
