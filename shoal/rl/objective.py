"""The clipped policy objective: GRPO and the variants that differ from it in one choice each.

Every variant is `min(ratio * A, clip(ratio) * A) - kl_coefficient * KL`, per response token. They differ in

- what is averaged: per sequence first (`sequence`, DeepSeekMath eq. 3), over all tokens of the batch (`token`, DAPO,
  arXiv 2503.14476), or token sums over a constant length (`constant`, Dr. GRPO, arXiv 2503.20783);
- how far the ratio may go: symmetric, wider above (DAPO 0.2 / 0.28), or hardly limited (R1: 10, whose lower bound
  1 - 10 never binds);
- whose ratio it is: the token's, or the geometric mean over its sequence (`level="sequence"`, GSPO, arXiv 2507.18071).

R1's paper prints the sequence form without the length root; every open framework, and we, use per-token ratios there.
Normalisers are handed in, so that the gradient of a step does not depend on how it is cut into micro-batches.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.errors import ConfigError, TaskError

MAX_LOG_RATIO = 20.0
"""Log-ratios beyond this are cut before exponentiation: exp(20) is already absurd, exp(90) is infinite in float32."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Which variant. The default is DAPO's averaging with GRPO's clip and no KL."""

    clip_low: float = 0.2
    """The ratio may fall to `1 - clip_low`; 1 or more never binds. R1 used 10."""
    clip_high: float = 0.2
    """The ratio may rise to `1 + clip_high`. DAPO used 0.28, R1 used 10, GSPO 4e-4."""
    kl_coefficient: float = 0.0
    """Weight of the divergence from the reference policy; R1 used 0.001."""
    loss_average: Literal["token", "sequence", "constant"] = "token"
    max_response_tokens: int | None = None
    """The constant length that "constant" divides by; unused otherwise."""
    level: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "kl_coefficient"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be 0 or positive.")
        if self.loss_average not in ("token", "sequence", "constant"):
            raise ConfigError(f"loss_average={self.loss_average!r} is unknown; use 'token', 'sequence' or 'constant'.")
        if self.level not in ("token", "sequence"):
            raise ConfigError(f"level={self.level!r} is unknown; use 'token' or 'sequence'.")
        if self.loss_average == "constant" and (self.max_response_tokens or 0) < 1:
            raise ConfigError("loss_average='constant' divides by max_response_tokens; give the longest response.")


@dataclass(frozen=True, kw_only=True)
class ObjectiveResult:
    """The loss to minimise, and what the numbers looked like (means over this micro-batch's response tokens)."""

    loss: Tensor
    """Scalar with gradient."""
    clip_fraction: float
    """Share of tokens whose gradient the clip removed."""
    kl: float
    """k3 estimate of the divergence from the reference, nats per token; 0 without a reference."""
    ratio_mean: float


def policy_objective(
    logprob_MT: Tensor,
    old_logprob_MT: Tensor,
    advantage_M: Tensor,
    mask_MT: Tensor,
    config: ObjectiveConfig,
    reference_logprob_MT: Tensor | None = None,
    *,
    num_tokens_total: int | None = None,
    num_sequences_total: int | None = None,
) -> ObjectiveResult:
    """Negated objective of M answers of up to T tokens; 0 with a zero gradient when nothing is masked in.

    Args:
        logprob_MT: log-probabilities of the response tokens under the policy, with gradient.
        old_logprob_MT: the same under the policy that sampled them.
        advantage_M: one per answer, from `advantage`.
        mask_MT: true (or 1) at response tokens; what stands elsewhere is never looked at.
        reference_logprob_MT: the same under the reference; needed for a KL coefficient, measured without one.
        num_tokens_total: response tokens of the whole step, over all micro-batches; None counts this one.
        num_sequences_total: answers of the whole step; None counts this one.
    Raises:
        TaskError: shapes that do not fit, an advantage that is not finite, a KL coefficient without a reference.
    """
    _check(logprob_MT, old_logprob_MT, advantage_M, mask_MT, config, reference_logprob_MT)
    mask_MT = mask_MT.bool()
    length_M = mask_MT.sum(dim=1)
    # Masked places may hold anything, infinities too: cut them before any arithmetic, so no NaN reaches a gradient.
    log_ratio_MT = torch.where(mask_MT, logprob_MT - old_logprob_MT, 0.0)
    if config.level == "sequence":
        log_ratio_MT = (log_ratio_MT.sum(dim=1) / length_M.clamp_min(1)).unsqueeze(1).expand_as(log_ratio_MT)
    ratio_MT = log_ratio_MT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantage_M1 = advantage_M.to(ratio_MT.dtype).unsqueeze(1)
    clipped_MT = ratio_MT.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain_MT = torch.minimum(ratio_MT * advantage_M1, clipped_MT * advantage_M1)
    kl_MT = _k3_divergence(logprob_MT, reference_logprob_MT, mask_MT)
    if config.kl_coefficient:
        gain_MT = gain_MT - config.kl_coefficient * kl_MT
    loss = -_average(gain_MT, mask_MT, length_M, config, num_tokens_total, num_sequences_total)
    was_clipped_MT = (clipped_MT * advantage_M1 < ratio_MT * advantage_M1) & mask_MT
    num_tokens = max(int(length_M.sum()), 1)
    return ObjectiveResult(
        loss=loss,
        clip_fraction=int(was_clipped_MT.sum()) / num_tokens,
        kl=float((kl_MT.detach() * mask_MT).sum()) / num_tokens,
        ratio_mean=float((ratio_MT.detach() * mask_MT).sum()) / num_tokens,
    )


def token_entropy(logits: Tensor, *, chunk_rows: int = 1024) -> Tensor:
    """Entropy of each distribution in nats, at least float32, shape `logits.shape[:-1]`.

    Rows are taken `chunk_rows` at a time, so that the probabilities of all of them never exist at once. Tokens that a
    sampler ruled out (logit minus infinity) count as impossible.
    """
    flat_MV = logits.reshape(-1, logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    parts = [torch.special.entr(rows.to(dtype).softmax(dim=-1)).sum(dim=-1) for rows in flat_MV.split(chunk_rows)]
    return torch.cat(parts).view(logits.shape[:-1]) if len(flat_MV) else logits.new_zeros(logits.shape[:-1]).to(dtype)


def _k3_divergence(logprob_MT: Tensor, reference_MT: Tensor | None, mask_MT: Tensor) -> Tensor:
    """Schulman's k3: `exp(d) - d - 1` with `d = log reference - log policy`; unbiased and never negative."""
    if reference_MT is None:
        return torch.zeros_like(logprob_MT)
    difference_MT = torch.where(mask_MT, reference_MT - logprob_MT, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference_MT.exp() - difference_MT - 1


def _average(
    value_MT: Tensor,
    mask_MT: Tensor,
    length_M: Tensor,
    config: ObjectiveConfig,
    num_tokens_total: int | None,
    num_sequences_total: int | None,
) -> Tensor:
    sum_M = torch.where(mask_MT, value_MT, 0.0).sum(dim=1)
    if config.loss_average == "token":
        return sum_M.sum() / max(int(length_M.sum()) if num_tokens_total is None else num_tokens_total, 1)
    num_sequences = max(len(sum_M) if num_sequences_total is None else num_sequences_total, 1)
    if config.loss_average == "sequence":
        return (sum_M / length_M.clamp_min(1)).sum() / num_sequences
    assert config.max_response_tokens is not None
    return sum_M.sum() / (num_sequences * config.max_response_tokens)


def _check(
    logprob_MT: Tensor,
    old_logprob_MT: Tensor,
    advantage_M: Tensor,
    mask_MT: Tensor,
    config: ObjectiveConfig,
    reference_MT: Tensor | None,
) -> None:
    shapes = [list(t.shape) for t in (logprob_MT, old_logprob_MT, mask_MT)]
    if reference_MT is not None:
        shapes.append(list(reference_MT.shape))
    if logprob_MT.ndim != 2 or any(shape != shapes[0] for shape in shapes) or advantage_M.shape != logprob_MT.shape[:1]:
        raise TaskError(
            f"log-probabilities and mask must share one shape [answers, tokens], got {shapes}; "
            f"and one advantage per answer, got {list(advantage_M.shape)}."
        )
    if not bool(torch.isfinite(advantage_M).all()):
        raise TaskError("an advantage is not a finite number; look at the rewards it was made from.")
    if config.kl_coefficient and reference_MT is None:
        raise TaskError(
            f"kl_coefficient={config.kl_coefficient} needs the reference policy's log-probabilities; pass them, or set it to 0."
        )
