"""How learning rate and batch grow and shrink over a run.

Schedules are pure functions of the step, so that a resumed run needs nothing but its step number. Warm-up is linear;
then the rate stays ("constant"), follows half a cosine ("cosine"), or stays and drops at the end ("wsd", warm-up-stable-
decay, arXiv 2404.06395, which lets one long run be branched at any length). "v3" is the published pretraining curve
(DeepSeek-V3 §4.2). `BatchRamp` is its companion: few rows early, when gradients agree, many later.
"""

import math
from dataclasses import dataclass
from typing import Literal

from shoal.errors import ConfigError

V3_STEADY_FRACTION = 10.0 / 14.8
"""Share of tokens after which V3's rate starts to fall: 10T of 14.8T."""
V3_COSINE_FRACTION = 14.3 / 14.8
"""Where the cosine ends: 4.3T later, at a tenth of the peak."""
V3_LAST_FRACTION = 14.633 / 14.8
"""Where the last step down is: after 333B more, for the remaining 167B."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate as a multiple of its peak."""

    kind: Literal["constant", "cosine", "wsd", "v3"] = "constant"
    warmup_steps: int = 0
    """Steps of linear warm-up; the last of them has the full rate."""
    total_steps: int
    decay_fraction: float = 0.2
    """wsd: the share of all steps, at the end, in which the rate falls."""
    decay_shape: Literal["linear", "one_minus_sqrt"] = "linear"
    """wsd: how it falls."""
    min_fraction: float = 0.0
    """cosine and wsd: what the rate falls towards, as a share of the peak."""

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "cosine", "wsd", "v3"):
            raise ConfigError(f"schedule kind={self.kind!r} is unknown; use 'constant', 'cosine', 'wsd' or 'v3'.")
        if self.decay_shape not in ("linear", "one_minus_sqrt"):
            raise ConfigError(f"decay_shape={self.decay_shape!r} is unknown; use 'linear' or 'one_minus_sqrt'.")
        if self.total_steps < 1:
            raise ConfigError(f"total_steps={self.total_steps} must be at least 1.")
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps={self.warmup_steps} must not be negative; 0 starts at full rate.")
        for name in ("decay_fraction", "min_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be between 0 and 1.")
        latest = self.total_steps if self.kind == "cosine" else self._decay_start
        if self.kind != "constant" and self.warmup_steps > latest:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} goes past step {latest:g} of {self.total_steps}, where the rate must "
                "already fall; warm up for less, or train longer."
            )

    @property
    def _decay_start(self) -> float:
        if self.kind == "wsd":
            return self.total_steps * (1 - self.decay_fraction)
        if self.kind == "v3":
            return self.total_steps * V3_STEADY_FRACTION
        return float(self.total_steps if self.kind == "constant" else self.warmup_steps)

    def multiplier(self, step: int) -> float:
        """Share of the peak rate at `step`, counted from 0; beyond the end it stays where the curve ends."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        if self.kind == "v3":
            return _v3_multiplier(step / self.total_steps)
        decay_steps = self.total_steps - self._decay_start
        if decay_steps <= 0:
            return 1.0
        progress = min(max((step - self._decay_start) / decay_steps, 0.0), 1.0)
        return self.min_fraction + (1 - self.min_fraction) * self._left(progress)

    def _left(self, progress: float) -> float:
        """What is left of the falling part after `progress` of the decay, 1 to 0."""
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - (math.sqrt(progress) if self.decay_shape == "one_minus_sqrt" else progress)


def _v3_multiplier(done: float) -> float:
    if done < V3_STEADY_FRACTION:
        return 1.0
    if done < V3_COSINE_FRACTION:
        progress = (done - V3_STEADY_FRACTION) / (V3_COSINE_FRACTION - V3_STEADY_FRACTION)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
    return 0.1 if done < V3_LAST_FRACTION else 7.3e-6 / 2.2e-4


def v3_schedule(total_steps: int, warmup_steps: int = 2000) -> Schedule:
    """The published V3 curve, its breakpoints at the same shares of the run.

    Differs from the paper: shares of steps instead of tokens, which differ while the batch is still ramping up.
    """
    return Schedule(kind="v3", total_steps=total_steps, warmup_steps=warmup_steps)


@dataclass(frozen=True, kw_only=True)
class BatchRamp:
    """Rows per optimizer step that grow from `start_rows` to `end_rows`, in whole micro-batches.

    Over steps the growth is linear (`ramp_steps`); over tokens (`ramp_tokens`, V3: 3072 to 15360 rows of 4096 in 469B
    tokens) it is linear in tokens seen, hence exponential in steps.
    """

    start_rows: int
    end_rows: int
    rows_per_micro_batch: int = 1
    ramp_steps: int | None = None
    ramp_tokens: float | None = None
    tokens_per_row: int | None = None
    """Needed with `ramp_tokens`."""

    def __post_init__(self) -> None:
        if not 1 <= self.rows_per_micro_batch <= self.start_rows <= self.end_rows:
            raise ConfigError(
                f"rows must satisfy 1 <= rows_per_micro_batch={self.rows_per_micro_batch} <= "
                f"start_rows={self.start_rows} <= end_rows={self.end_rows}."
            )
        if (self.ramp_steps is None) == (self.ramp_tokens is None):
            raise ConfigError("give either ramp_steps or ramp_tokens: one of them says how long the batch grows.")
        if self.ramp_steps is not None and self.ramp_steps < 1:
            raise ConfigError(f"ramp_steps={self.ramp_steps} must be at least 1.")
        if self.ramp_tokens is not None and (self.ramp_tokens <= 0 or (self.tokens_per_row or 0) < 1):
            raise ConfigError("ramp_tokens must be positive and comes with tokens_per_row, the length of a row.")

    def rows(self, step: int) -> float:
        """Rows wanted at `step`, before rounding to micro-batches."""
        growth = self.end_rows - self.start_rows
        if self.ramp_steps is not None:
            return self.start_rows + growth * min(step / self.ramp_steps, 1.0)
        assert self.ramp_tokens is not None and self.tokens_per_row is not None
        # rows = start + growth * tokens / ramp_tokens and d tokens / d step = rows * tokens_per_row.
        exponent = growth * self.tokens_per_row / self.ramp_tokens * step
        limit = math.log(self.end_rows / self.start_rows)
        return self.end_rows if exponent >= limit else self.start_rows * math.exp(exponent)

    def micro_batches(self, step: int) -> int:
        """Micro-batches to read for `step`, at least one."""
        return max(round(self.rows(step) / self.rows_per_micro_batch), 1)
