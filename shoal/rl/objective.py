"""The clipped policy objective: GRPO and the variants that differ from it in one choice each.

Every variant is `min(ratio * A, clip(ratio) * A) - kl_coefficient * KL`, per response token. They differ in

- what is averaged: per sequence first (`sequence`, DeepSeekMath eq. 3), over all tokens of the batch (`token`, DAPO,
  arXiv 2503.14476), or token sums over a constant length (`constant`, Dr. GRPO, arXiv 2503.20783);
- how far the ratio may go: symmetric, wider above (DAPO 0.2 / 0.28), or hardly limited (R1: 10, whose lower bound
  1 - 10 never binds);
- whose ratio it is: the token's, or the geometric mean over its sequence (`level="sequence"`, GSPO, arXiv 2507.18071);
- how the divergence is estimated: Schulman's k3, whose *gradient* is biased once samples are not the policy's own, or k3
  times the token's ratio, whose gradient is that of the divergence itself (`"unbiased"`, DeepSeek-V3.2 §3.1,
  arXiv 2512.02556);
- what is left out or weighted down because it is too far off-policy: wrong answers that have drifted
  (`off_policy_threshold`, V3.2 §3.1), and tokens the engine drew from another distribution (`importance`).

The last two act on the policy term alone, never on the divergence, and leave every normaliser as it is.
R1's paper prints the sequence form without the length root; every open framework, and we, use per-token ratios there.
Normalisers are handed in, so that the gradient of a step does not depend on how it is cut into micro-batches.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.errors import ConfigError, TaskError
from shoal.rl.importance import ImportanceConfig, importance_weights

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
    kl_estimator: Literal["k3", "unbiased"] = "k3"
    off_policy_threshold: float | None = None
    """Answers with a negative advantage whose mean log(sampler / policy) exceeds this, nats per token, do not count."""
    importance: ImportanceConfig | None = None
    """Weights that correct for the engine's own distribution; needs the engine's log-probabilities."""

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
        if self.kl_estimator not in ("k3", "unbiased"):
            raise ConfigError(f"kl_estimator={self.kl_estimator!r} is unknown; use 'k3' or 'unbiased'.")
        if self.off_policy_threshold is not None and not self.off_policy_threshold > 0:
            raise ConfigError(
                f"off_policy_threshold={self.off_policy_threshold} must be positive (nats per token), or None for no mask."
            )


@dataclass(frozen=True, kw_only=True)
class ObjectiveResult:
    """The loss to minimise, and what the numbers looked like (means over this micro-batch's response tokens)."""

    loss: Tensor
    """Scalar with gradient."""
    clip_fraction: float
    """Share of tokens whose gradient the clip removed."""
    kl: float
    """Estimate of the divergence from the reference, nats per token; 0 without a reference."""
    ratio_mean: float
    clip_high_fraction: float = 0.0
    """The part of `clip_fraction` at the upper bound: right answers that may not become likelier still."""
    off_policy_fraction: float = 0.0
    """Share of the answers that the off-policy mask left out."""
    importance_mean: float = 1.0
    importance_bounded_fraction: float = 0.0
    """Share of the tokens whose importance weight was cut or dropped."""


def policy_objective(
    logprob_MT: Tensor,
    old_logprob_MT: Tensor,
    advantage_M: Tensor,
    mask_MT: Tensor,
    config: ObjectiveConfig,
    reference_logprob_MT: Tensor | None = None,
    *,
    engine_logprob_MT: Tensor | None = None,
    num_tokens_total: int | None = None,
    num_sequences_total: int | None = None,
) -> ObjectiveResult:
    """Negated objective of M answers of up to T tokens; 0 with a zero gradient when nothing is masked in.

    Args:
        logprob_MT: log-probabilities of the response tokens under the policy, with gradient.
        old_logprob_MT: the same before this rollout's first update: the trainer's, or the engine's if nobody
            recomputed them.
        advantage_M: one per answer, from `advantage`.
        mask_MT: true (or 1) at response tokens; what stands elsewhere is never looked at.
        reference_logprob_MT: the same under the reference; needed for a KL coefficient, measured without one.
        engine_logprob_MT: the same as the engine reported them; None where `old_logprob_MT` are the engine's already.
            Needed for `config.importance`; the off-policy mask measures from them.
        num_tokens_total: response tokens of the whole step, over all micro-batches; None counts this one.
        num_sequences_total: answers of the whole step; None counts this one.
    Raises:
        TaskError: shapes that do not fit, an advantage that is not finite, a KL coefficient without a reference,
            importance weights without the engine's log-probabilities.
    """
    _check(logprob_MT, old_logprob_MT, advantage_M, mask_MT, config, reference_logprob_MT, engine_logprob_MT)
    mask_MT = mask_MT.bool()
    length_M = mask_MT.sum(dim=1)
    # Masked places may hold anything, infinities too: cut them before any arithmetic, so no NaN reaches a gradient.
    log_ratio_MT = torch.where(mask_MT, logprob_MT - old_logprob_MT, 0.0)
    kl_MT = _divergence(logprob_MT, reference_logprob_MT, mask_MT, log_ratio_MT, config)
    ratio_MT = _ratio(log_ratio_MT, length_M, config.level)
    advantage_M1 = advantage_M.to(ratio_MT.dtype).unsqueeze(1)
    clipped_MT = ratio_MT.clamp(1 - config.clip_low, 1 + config.clip_high)
    was_clipped_MT = (clipped_MT * advantage_M1 < ratio_MT * advantage_M1) & mask_MT
    gain_MT = torch.minimum(ratio_MT * advantage_M1, clipped_MT * advantage_M1)
    gain_MT, facts = _discount_off_policy(
        gain_MT, logprob_MT, old_logprob_MT, engine_logprob_MT, advantage_M, mask_MT, config
    )
    if config.kl_coefficient:
        gain_MT = gain_MT - config.kl_coefficient * kl_MT
    num_tokens = max(int(length_M.sum()), 1)
    return ObjectiveResult(
        loss=-_average(gain_MT, mask_MT, length_M, config, num_tokens_total, num_sequences_total),
        clip_fraction=int(was_clipped_MT.sum()) / num_tokens,
        clip_high_fraction=int((was_clipped_MT & (advantage_M1 > 0)).sum()) / num_tokens,
        kl=float((kl_MT.detach() * mask_MT).sum()) / num_tokens,
        ratio_mean=float((ratio_MT.detach() * mask_MT).sum()) / num_tokens,
        **facts,
    )


@torch.no_grad()
def off_policy_sequences(
    logprob_MT: Tensor, sampler_logprob_MT: Tensor, advantage_M: Tensor, mask_MT: Tensor, threshold: float
) -> Tensor:
    """Which answers the off-policy sequence mask leaves out, bool `[M]`.

    DeepSeek-V3.2 §3.1: those with a negative advantage and a mean of `log sampler - log policy` over their tokens above
    the threshold. A policy learns most from its own mistakes; somebody else's, pushed down, only unsettle it. Right
    answers stay whoever wrote them.

    Args:
        logprob_MT: under the policy as it is now.
        sampler_logprob_MT: under the policy that drew the tokens, best as the engine itself reported them.
        threshold: nats per token.
    """
    mask_MT = mask_MT.bool()
    drift_M = torch.where(mask_MT, sampler_logprob_MT - logprob_MT, 0.0).sum(dim=1) / mask_MT.sum(dim=1).clamp_min(1)
    return (advantage_M < 0) & (drift_M > threshold)


def token_entropy(logits: Tensor, *, chunk_rows: int = 1024) -> Tensor:
    """Entropy of each distribution in nats, at least float32, shape `logits.shape[:-1]`.

    Rows are taken `chunk_rows` at a time, so that the probabilities of all of them never exist at once. Tokens that a
    sampler ruled out (logit minus infinity) count as impossible.
    """
    flat_MV = logits.reshape(-1, logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    parts = [torch.special.entr(rows.to(dtype).softmax(dim=-1)).sum(dim=-1) for rows in flat_MV.split(chunk_rows)]
    return torch.cat(parts).view(logits.shape[:-1]) if len(flat_MV) else logits.new_zeros(logits.shape[:-1]).to(dtype)


def _discount_off_policy(
    gain_MT: Tensor,
    logprob_MT: Tensor,
    old_logprob_MT: Tensor,
    engine_logprob_MT: Tensor | None,
    advantage_M: Tensor,
    mask_MT: Tensor,
    config: ObjectiveConfig,
) -> tuple[Tensor, dict[str, float]]:
    """The policy term under off-policy mask and importance weights, and what they did, by its name in the result."""
    sampler_MT = old_logprob_MT if engine_logprob_MT is None else engine_logprob_MT
    facts: dict[str, float] = {}
    if config.off_policy_threshold is not None:
        left_out_M = off_policy_sequences(logprob_MT, sampler_MT, advantage_M, mask_MT, config.off_policy_threshold)
        gain_MT = torch.where(left_out_M.unsqueeze(1), 0.0, gain_MT)
        facts["off_policy_fraction"] = int(left_out_M.sum()) / max(len(left_out_M), 1)
    if config.importance is not None:
        weights = importance_weights(old_logprob_MT, sampler_MT, mask_MT, config.importance)
        gain_MT = gain_MT * weights.weight_MT
        facts |= {"importance_mean": weights.mean, "importance_bounded_fraction": weights.bounded_fraction}
    return gain_MT, facts


def _ratio(log_ratio_MT: Tensor, length_M: Tensor, level: str) -> Tensor:
    if level == "sequence":
        log_ratio_MT = (log_ratio_MT.sum(dim=1) / length_M.clamp_min(1)).unsqueeze(1).expand_as(log_ratio_MT)
    return _bounded_exp(log_ratio_MT)


def _bounded_exp(log_ratio_MT: Tensor) -> Tensor:
    return log_ratio_MT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _divergence(
    logprob_MT: Tensor, reference_MT: Tensor | None, mask_MT: Tensor, log_ratio_MT: Tensor, config: ObjectiveConfig
) -> Tensor:
    """Schulman's k3, `exp(d) - d - 1` with `d = log reference - log policy`: never negative, unbiased on-policy.

    "unbiased" multiplies it by the token's ratio, differentiated as well: the value is then unbiased for the sampler's
    tokens, and the gradient collapses to `ratio * (log policy - log reference)`, that of the divergence itself. k3 alone
    gives `1 - reference / policy`, which explodes where the policy has become much less likely than the reference.
    """
    if reference_MT is None:
        return torch.zeros_like(logprob_MT)
    difference_MT = torch.where(mask_MT, reference_MT - logprob_MT, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    k3_MT = difference_MT.exp() - difference_MT - 1
    # Always the token's own ratio: a sequence's geometric mean (GSPO) is no importance weight of its tokens.
    return k3_MT if config.kl_estimator == "k3" else k3_MT * _bounded_exp(log_ratio_MT)


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
    engine_MT: Tensor | None,
) -> None:
    given = (logprob_MT, old_logprob_MT, mask_MT, reference_MT, engine_MT)
    shapes = [list(t.shape) for t in given if t is not None]
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
    if config.importance is not None and engine_MT is None:
        raise TaskError(
            "importance weights compare the trainer with the engine: pass engine_logprob_MT beside the trainer's own "
            "old_logprob_MT, or set importance to None."
        )
