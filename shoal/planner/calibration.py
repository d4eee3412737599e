"""What this machine really does, measured once in about a minute, and what follows for runs that have not been made.

Utilisation is no property of a machine alone: two cores reach 0.25 of their peak with wide models and a twentieth with tiny
ones, whose steps are mostly fixed costs. So a calibration times steps of two shapes, each at two batch sizes, and takes the
two apart:

    step = fixed seconds per layer * layers + tokens * operations per token / rate

with a rate for each shape, in between by the operations per token on a logarithmic scale. Decoding is the same with bytes in
the place of operations. Peak memory is more than what is held at once: the allocator keeps what it freed, and with batches
of ever new shapes it keeps more, by the logarithm of the steps, measured too.

The measuring itself is `shoal/recipes/measure_machine.py`; this file only computes, so that a plan needs no torch.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.planner.activations import recipe
from shoal.planner.cost import Assumption
from shoal.planner.counts import cache_bytes_per_token, parameter_counts, training_flops_per_token
from shoal.planner.hardware import Cluster
from shoal.planner.memory import TrainingPlan, training_memory
from shoal.planner.training import stated_utilisation

FORMAT = 1
CALIBRATED_STEP_TOKENS = 4096
"""Tokens of a step where a plan does not say how many rows it has: about the demo's."""


@dataclass(frozen=True, kw_only=True)
class TrainingPoint:
    """Steps of one shape and batch."""

    model: ModelConfig
    batch_rows: int
    row_tokens: int
    step_s: float
    """Median."""

    @property
    def tokens(self) -> int:
        """Positions of a step, padding included."""
        return self.batch_rows * self.row_tokens

    @property
    def flops_per_token(self) -> float:
        """MTP modules included, as they are worked on."""
        return training_flops_per_token(self.model, self.row_tokens, include_mtp=True)

    @property
    def layers(self) -> int:
        """MTP modules included."""
        return self.model.num_hidden_layers + self.model.num_nextn_predict_layers


@dataclass(frozen=True, kw_only=True)
class DecodePoint:
    """One sequence, written token by token, weights in bf16."""

    model: ModelConfig
    context_tokens: int
    step_s: float


@dataclass(frozen=True, kw_only=True)
class MemoryGrowth:
    """Peak resident memory of a fresh process that trains: `first + per_e_fold * ln(steps)` for one shape."""

    model: ModelConfig
    batch_rows: int
    row_tokens: int
    base_bytes: int
    """Before the model was made."""
    first_bytes: float
    """At step 1, by the fit."""
    per_e_fold_bytes: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Everything measured, on which machine and when."""

    machine: Mapping[str, Any]
    commit: str | None
    made: str
    """Date, ISO 8601."""
    seed: int
    training: tuple[TrainingPoint, ...]
    """Two of a small shape, then two of a larger one, few rows before many."""
    decoding: tuple[DecodePoint, ...]
    """A small shape, then one whose weights exceed the caches."""
    memory: MemoryGrowth
    format: int = FORMAT

    def training_step_s(self, model: ModelConfig, batch_rows: int, row_tokens: int) -> float:
        """Seconds that an optimizer step will take."""
        asked = TrainingPoint(model=model, batch_rows=batch_rows, row_tokens=row_tokens, step_s=0.0)
        shapes = [_Shape.of(*self.training[start : start + 2]) for start in range(0, len(self.training), 2)]
        fixed_s = _between(asked.flops_per_token, [(one.flops_per_token, one.fixed_s_per_layer) for one in shapes])
        rate = _between(asked.flops_per_token, [(one.flops_per_token, one.flops_per_s) for one in shapes])
        return fixed_s * asked.layers + asked.tokens * asked.flops_per_token / rate

    def training_flops_per_s(self, model: ModelConfig, batch_rows: int, row_tokens: int) -> float:
        """Model operations per second, by the published convention (no MTP modules), of a whole step."""
        step_s = self.training_step_s(model, batch_rows, row_tokens)
        return batch_rows * row_tokens * training_flops_per_token(model, row_tokens) / step_s

    def training_peak_bytes(self, model: ModelConfig, batch_rows: int, row_tokens: int, steps: int) -> float:
        """Highest resident memory of the process after `steps`."""
        growth = self.memory
        held = _held_bytes(model, batch_rows, row_tokens)
        measured = _held_bytes(growth.model, growth.batch_rows, growth.row_tokens)
        above = growth.first_bytes - growth.base_bytes + growth.per_e_fold_bytes * math.log(max(1, steps))
        return growth.base_bytes + above * held / measured

    def decode_tokens_per_s(self, model: ModelConfig, context_tokens: int) -> float:
        """Of one sequence, weights in bf16."""
        small, large = self.decoding
        layers = [one.model.num_hidden_layers for one in self.decoding]
        sizes = [decode_bytes(one.model, one.context_tokens) for one in self.decoding]
        # Two equations for seconds per layer and per byte.
        determinant = layers[0] * sizes[1] - layers[1] * sizes[0]
        per_layer_s = (small.step_s * sizes[1] - large.step_s * sizes[0]) / determinant
        per_byte_s = (layers[0] * large.step_s - layers[1] * small.step_s) / determinant
        return 1 / (per_layer_s * model.num_hidden_layers + per_byte_s * decode_bytes(model, context_tokens))


def measured_utilisation(
    calibration: Calibration, model: ModelConfig, cluster: Cluster, row_tokens: int
) -> Assumption | None:
    """What this machine reaches with such a model, where `cluster` is this machine; None where it is another."""
    cores = re.fullmatch(r"(?:cpu|amx)-(\d+)core", cluster.device.name)
    if cluster.count != 1 or cores is None or int(cores[1]) != calibration.machine.get("num_cores"):
        return None
    rows = max(1, -(-CALIBRATED_STEP_TOKENS // row_tokens))
    reached = calibration.training_flops_per_s(model, rows, row_tokens) / cluster.peak_flops("bf16")
    source = f"calibrated on this machine ({calibration.made}), steps of {rows} rows of {row_tokens} tokens"
    return stated_utilisation(min(1.0, max(1e-6, reached)), source)


def decode_bytes(model: ModelConfig, context_tokens: int) -> float:
    """What one token reads: active parameters and the cache, both in bf16."""
    return 2.0 * parameter_counts(model).active + context_tokens * cache_bytes_per_token(model)


def calibration_path() -> Path:
    """Where this user's calibration is kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shoal" / "calibration.json"


def load_calibration(path: Path | None = None) -> Calibration | None:
    """The calibration of this user; None where there is none.

    Raises:
        ConfigError: a file that is damaged or of another version; says how to make a new one.
    """
    where = path or calibration_path()
    if not where.is_file():
        return None
    try:
        return calibration_from_json(json.loads(where.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise ConfigError(
            f"the calibration {where} cannot be used ({error}); measure again with: shoal plan --calibrate"
        ) from None


def calibration_from_json(values: Mapping[str, Any]) -> Calibration:
    """The inverse of `to_json`.

    Raises:
        ValueError, KeyError, TypeError, ConfigError: not what `to_json` wrote.
    """
    if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']!r}, this version reads {FORMAT}")
    training = tuple(TrainingPoint(**_with_model(one)) for one in values["training"])
    decoding = tuple(DecodePoint(**_with_model(one)) for one in values["decoding"])
    if len(training) != 4 or len(decoding) != 2:
        raise ValueError(f"{len(training)} training and {len(decoding)} decoding points; 4 and 2 are needed")
    plain = {
        one.name: values[one.name] for one in fields(Calibration) if one.name in ("machine", "commit", "made", "seed")
    }
    return Calibration(
        **plain, training=training, decoding=decoding, memory=MemoryGrowth(**_with_model(values["memory"]))
    )


def to_json(calibration: Calibration) -> dict[str, Any]:
    """Plain values."""
    return asdict(calibration)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What two batch sizes of one shape say."""

    flops_per_token: float
    fixed_s_per_layer: float
    flops_per_s: float

    @classmethod
    def of(cls, few: TrainingPoint, many: TrainingPoint) -> "_Shape":
        per_token_s = (many.step_s - few.step_s) / (many.tokens - few.tokens)
        if per_token_s <= 0:  # noise larger than the batch: then nothing is known of fixed costs
            per_token_s = many.step_s / many.tokens
        return cls(
            flops_per_token=many.flops_per_token,
            fixed_s_per_layer=max(0.0, many.step_s - per_token_s * many.tokens) / many.layers,
            flops_per_s=many.flops_per_token / per_token_s,
        )


def _between(flops: float, points: list[tuple[float, float]]) -> float:
    """The value between two measured shapes, on a logarithmic scale of operations; beyond them the nearer one's."""
    (low, at_low), (high, at_high) = sorted(points)
    share = min(1.0, max(0.0, (math.log(flops) - math.log(low)) / (math.log(high) - math.log(low))))
    return at_low + share * (at_high - at_low)


def _held_bytes(model: ModelConfig, batch_rows: int, row_tokens: int) -> int:
    plan = TrainingPlan(recipe=recipe("cpu"), micro_batch=batch_rows, sequence_tokens=row_tokens, recompute="none")
    return training_memory(model, plan).total_bytes


def _with_model(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "model": ModelConfig.from_dict(values["model"])}
