"""Importance weights between the engine that sampled and the trainer that learns.

Two programs of one model disagree a little: other kernels, other precision, weights that are a step old, an expert chosen
by a hair. The answers come from the engine's distribution while the gradient pretends that they came from the trainer's.
The weight `trainer / engine`, both *before* the update, repairs the expectation; it multiplies the policy term and has no
gradient of its own.

- Per token the weight varies little, but it ignores that the prefix came from the engine too: biased. Per sequence it is
  the product over the answer: unbiased, with a variance that grows with length.
- Either way a few weights explode, so they are bounded: cut to the bounds (truncated importance sampling, TIS), or
  dropped outside them (masked importance sampling; IcePop drops tokens outside 0.5 and 5).

A dropped token keeps its place in the normaliser, so that bounding never rescales the others.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.errors import ConfigError, TaskError


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """How the engine's samples are weighted. The default is token-level TIS with the cap 2."""

    level: Literal["token", "sequence"] = "token"
    bound: Literal["truncate", "mask"] = "truncate"
    """What happens to a weight outside `low` and `high`: moved to the nearer one, or set to 0."""
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        if self.level not in ("token", "sequence"):
            raise ConfigError(f"importance level={self.level!r} is unknown; use 'token' or 'sequence'.")
        if self.bound not in ("truncate", "mask"):
            raise ConfigError(f"importance bound={self.bound!r} is unknown; use 'truncate' or 'mask'.")
        if not (0 <= self.low <= 1 <= self.high and math.isfinite(self.high)):
            raise ConfigError(
                f"importance bounds low={self.low} and high={self.high} must enclose 1 (the weight where engine and "
                "trainer agree), not be negative, and be finite; common are 0 and 2."
            )


@dataclass(frozen=True, kw_only=True)
class ImportanceWeights:
    """The weights of one micro-batch, without gradient, and what bounding did to them."""

    weight_MT: Tensor
    """0 outside the mask."""
    mean: float
    """Over response tokens, after bounding; near 1 where engine and trainer agree."""
    bounded_fraction: float
    """Share of response tokens whose weight was cut or dropped."""


@torch.no_grad()
def importance_weights(
    trainer_logprob_MT: Tensor, engine_logprob_MT: Tensor, mask_MT: Tensor, config: ImportanceConfig
) -> ImportanceWeights:
    """Bounded `trainer / engine` for M answers of up to T tokens.

    Args:
        trainer_logprob_MT: log-probabilities of the response tokens under the trainer's weights before the update.
        engine_logprob_MT: the same as the engine reported them when it drew the tokens.
        mask_MT: true (or 1) at response tokens; what stands elsewhere is never looked at.
    Raises:
        TaskError: shapes that do not fit, or a log-probability of a response token that is not a number.
    """
    mask_MT = mask_MT.bool()
    log_ratio_MT = _log_ratio(trainer_logprob_MT, engine_logprob_MT, mask_MT)
    if config.level == "sequence":
        log_ratio_MT = log_ratio_MT.sum(dim=1, keepdim=True).expand_as(log_ratio_MT)
    ratio_MT = log_ratio_MT.exp()  # may be infinite, which both bounds handle
    is_outside_MT = ((ratio_MT < config.low) | (ratio_MT > config.high)) & mask_MT
    if config.bound == "truncate":
        ratio_MT = ratio_MT.clamp(config.low, config.high)
    else:
        ratio_MT = torch.where(is_outside_MT, 0.0, ratio_MT)
    weight_MT = torch.where(mask_MT, ratio_MT, 0.0)
    num_tokens = max(int(mask_MT.sum()), 1)
    return ImportanceWeights(
        weight_MT=weight_MT,
        mean=float(weight_MT.sum()) / num_tokens,
        bounded_fraction=int(is_outside_MT.sum()) / num_tokens,
    )


@torch.no_grad()
def mismatch_divergence(trainer_logprob_MT: Tensor, engine_logprob_MT: Tensor, mask_MT: Tensor) -> float:
    """Divergence of the trainer from the engine, nats per response token: the k3 estimate of KL(engine, trainer).

    The tokens are the engine's own samples, so the estimate is unbiased; it is never negative, and 0 means that sampling
    and learning see the same model. Arguments and errors as in `importance_weights`.
    """
    mask_MT = mask_MT.bool()
    log_ratio_MT = _log_ratio(trainer_logprob_MT, engine_logprob_MT, mask_MT)
    return float((log_ratio_MT.exp() - log_ratio_MT - 1).sum()) / max(int(mask_MT.sum()), 1)


def _log_ratio(trainer_MT: Tensor, engine_MT: Tensor, mask_MT: Tensor) -> Tensor:
    if trainer_MT.ndim != 2 or not trainer_MT.shape == engine_MT.shape == mask_MT.shape:
        raise TaskError(
            "the trainer's and the engine's log-probabilities and the mask must share one shape [answers, tokens], got "
            f"{list(trainer_MT.shape)}, {list(engine_MT.shape)} and {list(mask_MT.shape)}."
        )
    log_ratio_MT = torch.where(mask_MT, trainer_MT - engine_MT, 0.0)
    if bool(log_ratio_MT.isnan().any()):
        raise TaskError("a log-probability of a response token is not a number; the engine must report every token's.")
    return log_ratio_MT
