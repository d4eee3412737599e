"""The learning half of a reinforcement-learning step: rollouts and their advantages in, moved weights out.

Answers without an advantage (every answer of the group scored the same) carry no gradient and are not computed. The rest
are packed several to a row (`packed_rollouts.py`); log-probabilities are taken at response tokens only. The
multi-token-prediction modules learn from the right answers behind a detached trunk, so that drafts keep up with the
policy they draft for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.model.load_balance import max_violation
from shoal.model.router import Routing
from shoal.model.transformer import Transformer
from shoal.rl.engine_replay import EngineReplay
from shoal.rl.importance import mismatch_divergence
from shoal.rl.objective import ObjectiveConfig, ObjectiveResult, policy_objective
from shoal.rl.packed_rollouts import PackedRollouts, pack_rollouts
from shoal.rl.rollout import Rollouts
from shoal.training.loss import cross_entropy, labels_ahead, token_log_probabilities
from shoal.training.optimizer import OptimizerSet
from shoal.training.step import CountTracker, finish_step


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """How the answers of an update are computed; none of it changes the gradient but `mtp_weight` and `bias_speed`."""

    row_tokens: int = 256
    micro_batch_answers: int = 512
    temperature: float = 1.0
    """As the answers were sampled."""
    bias_speed: float = 0.0
    mtp_weight: float = 0.0


@dataclass
class UpdateResult:
    """What one update did; fractions and means over response tokens that were computed."""

    grad_norm: float | None = None
    loss: float = 0.0
    clip_fraction: float = 0.0
    clip_high_fraction: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    mismatch: float = 0.0
    """Mean |log-probability of the engine - of the trainer| before the update: what sampling and learning disagree by."""
    mismatch_kl: float = 0.0
    """The same as a divergence of the trainer from the engine, nats per token."""
    off_policy_fraction: float = 0.0
    importance_mean: float = 0.0
    importance_bounded_fraction: float = 0.0
    num_tokens: int = 0
    max_violation: float | None = None


MEANS = (
    "clip_fraction",
    "clip_high_fraction",
    "kl",
    "entropy",
    "mismatch",
    "mismatch_kl",
    "off_policy_fraction",
    "importance_mean",
    "importance_bounded_fraction",
)
"""Fields of `UpdateResult` that are summed over micro-batches by tokens and then divided."""

Combine = Callable[[UpdateResult, CountTracker], None]


@dataclass(frozen=True)
class MicroBatch:
    """Some answers as rows, and by what they are averaged, which is the whole step's and not theirs."""

    packed: PackedRollouts
    advantage_M: Tensor
    step_tokens: int
    step_answers: int
    has_old_logprobs: bool
    """Whether the packed old log-probabilities are the trainer's and not the engine's."""
    weight: int = 1
    """0 for answers that are computed only because every process of a sharded learner must compute something."""


@dataclass(frozen=True, kw_only=True)
class UpdateBatch:
    """What one optimizer step learns from."""

    rollouts: Rollouts
    advantage_M: Tensor
    """One per answer of `rollouts`; `right`, `old_logprobs` and `replay` likewise."""
    right: Sequence[bool]
    answers: range | None = None
    """The minibatch; None means all."""
    old_logprobs: Sequence[Tensor] | None = None
    """The trainer's own before this rollout's first update (`policy_log_probabilities`); needed for importance weights, else
    the engine's serve."""
    replay: EngineReplay | None = None
    """The engine's experts and sampling masks."""


def plan_update(
    batch: UpdateBatch, objective: ObjectiveConfig, options: UpdateOptions, *, vocab_size: int, ranks: int = 1
) -> list[list[MicroBatch]]:
    """The micro-batches of one optimizer step, the same number for each rank; empty lists when nothing is to be learned.

    The normaliser counts every answer of the batch, also those left out for want of an advantage, so the gradient does
    not depend on how answers are cut into micro-batches or dealt to ranks.
    """
    rollouts, advantage_M = batch.rollouts, batch.advantage_M
    answers = range(len(advantage_M)) if batch.answers is None else batch.answers
    needs_all = objective.kl_coefficient > 0
    length_of = [len(completion.token_ids) for completion in rollouts.completions]
    chosen = [i for i in answers if length_of[i] and (needs_all or float(advantage_M[i]) != 0.0)]
    chosen.sort(key=lambda i: length_of[i])
    total_tokens = sum(length_of[i] for i in answers)

    def micro_batch(part: list[int]) -> MicroBatch:
        packed = pack_rollouts(
            rollouts,
            part or chosen[:1],
            batch.right,
            options.row_tokens,
            old_logprobs=batch.old_logprobs,
            replay=batch.replay,
            vocab_size=vocab_size,
        )
        return MicroBatch(
            packed,
            advantage_M[part or chosen[:1]],
            step_tokens=total_tokens,
            step_answers=len(answers),
            has_old_logprobs=batch.old_logprobs is not None,
            weight=int(bool(part)),
        )

    dealt = [chosen[rank::ranks] for rank in range(ranks)]
    starts = range(0, len(dealt[0]), options.micro_batch_answers)
    return [[micro_batch(share[start : start + options.micro_batch_answers]) for start in starts] for share in dealt]


def update_policy(
    model: Transformer,
    optimizers: OptimizerSet,
    micro_batches: Sequence[MicroBatch],
    objective: ObjectiveConfig,
    options: UpdateOptions,
    *,
    reference: Transformer | None = None,
    combine: Combine = lambda result, tracker: None,
) -> UpdateResult:
    """One optimizer step on a plan's micro-batches; none leave everything as it is.

    Args:
        combine: adds up what several ranks found, in place, before the weights and the balance biases move.
    """
    result = UpdateResult()
    if not micro_batches:
        return result
    tracker = CountTracker(model)
    for micro_batch in micro_batches:
        _learn_from(model, micro_batch, objective, options, reference, tracker, result)
    combine(result, tracker)
    result.grad_norm = finish_step(model, optimizers, tracker, options.bias_speed)
    result.max_violation = float(max_violation(tracker.count_LE).max()) if tracker.layers else None
    for name in MEANS:
        setattr(result, name, getattr(result, name) / max(result.num_tokens, 1))
    return result


def _learn_from(
    model: Transformer,
    micro_batch: MicroBatch,
    objective: ObjectiveConfig,
    options: UpdateOptions,
    reference: Transformer | None,
    tracker: CountTracker,
    result: UpdateResult,
) -> None:
    """Add the gradients of one micro-batch, and what is to be said of it."""
    packed = micro_batch.packed
    routing = packed.routing()
    hidden_BSD = _hidden(model, packed, routing)
    logprob_MT, entropy = _response_log_probabilities(model, hidden_BSD, packed, options.temperature)
    outcome = policy_objective(
        logprob_MT,
        packed.old_logprob_MT,
        micro_batch.advantage_M,
        packed.mask_MT,
        objective,
        reference_logprob_MT=_reference_log_probabilities(reference, packed, options.temperature),
        engine_logprob_MT=packed.engine_logprob_MT if micro_batch.has_old_logprobs else None,
        num_tokens_total=micro_batch.step_tokens,
        num_sequences_total=micro_batch.step_answers,
    )
    loss = outcome.loss
    if options.mtp_weight and model.config.num_nextn_predict_layers:
        loss = loss + options.mtp_weight * _draft_loss(model, hidden_BSD, packed, routing, micro_batch.step_tokens)
    (loss * micro_batch.weight).backward()
    tracker.add(routing, micro_batch.weight)
    if micro_batch.weight:
        _accumulate(result, outcome, logprob_MT.detach(), packed, entropy)


@torch.no_grad()
def policy_log_probabilities(
    model: Transformer, rollouts: Rollouts, options: UpdateOptions, *, replay: EngineReplay | None = None
) -> list[Tensor]:
    """The trainer's own log-probabilities of every answer's tokens, under the weights of now."""
    right = [False] * len(rollouts.completions)
    found = [torch.zeros(0)] * len(right)
    filled = [i for i, completion in enumerate(rollouts.completions) if completion.token_ids]
    filled.sort(key=lambda i: len(rollouts.completions[i].token_ids))
    for start in range(0, len(filled), options.micro_batch_answers):
        part = filled[start : start + options.micro_batch_answers]
        packed = pack_rollouts(
            rollouts, part, right, options.row_tokens, replay=replay, vocab_size=model.config.vocab_size
        )
        hidden_BSD = _hidden(model, packed, packed.routing())
        logprob_MT, _ = _response_log_probabilities(model, hidden_BSD, packed, options.temperature)
        for row, answer in enumerate(part):
            found[answer] = logprob_MT[row, : len(rollouts.completions[answer].token_ids)].clone()
    return found


def _hidden(model: Transformer, packed: PackedRollouts, routing: Routing | None) -> Tensor:
    return model(packed.token_BS, position_BS=packed.position_BS, document_BS=packed.document_BS, routing=routing)


def _response_log_probabilities(
    model: Transformer, hidden_BSD: Tensor, packed: PackedRollouts, temperature: float
) -> tuple[Tensor, float]:
    """Log-probabilities of the responses `[M, T]`, zero outside the mask, and the summed entropy."""
    place_N = packed.place_MT[packed.mask_MT]
    hidden_ND = hidden_BSD.reshape(-1, hidden_BSD.shape[-1]).index_select(0, place_N)
    token_N = packed.response_MT[packed.mask_MT]
    logprob_N, entropy_N = token_log_probabilities(model, hidden_ND, token_N, temperature, kept_MV=packed.kept_NV)
    logprob_MT = torch.zeros_like(packed.old_logprob_MT).masked_scatter(packed.mask_MT, logprob_N)
    return logprob_MT, float(entropy_N.sum())


@torch.no_grad()
def _reference_log_probabilities(
    reference: Transformer | None, packed: PackedRollouts, temperature: float
) -> Tensor | None:
    """The reference routes for itself: the replayed choices are the policy's."""
    if reference is None:
        return None
    return _response_log_probabilities(reference, _hidden(reference, packed, None), packed, temperature)[0]


def _draft_loss(
    model: Transformer, hidden_BSD: Tensor, packed: PackedRollouts, routing: Routing, total_tokens: int
) -> Tensor:
    """Cross-entropy of the MTP heads on right answers; nothing but the MTP modules receives a gradient."""
    heads = model.predict_ahead(
        hidden_BSD,
        packed.token_BS,
        position_BS=packed.position_BS,
        document_BS=packed.document_BS,
        routing=routing,
        detach_trunk=True,
    )
    parts = [
        cross_entropy(model, head_BSD, labels_ahead(packed.label_BS, packed.document_BS, depth), detach_head=True).total
        for depth, head_BSD in enumerate(heads, start=1)
    ]
    return torch.stack(parts).sum() / len(parts) / total_tokens


def _accumulate(
    result: UpdateResult, outcome: ObjectiveResult, logprob_MT: Tensor, packed: PackedRollouts, entropy: float
) -> None:
    tokens = int(packed.mask_MT.sum())
    result.loss += float(outcome.loss.detach())
    for name in ("clip_fraction", "clip_high_fraction", "kl", "off_policy_fraction"):
        setattr(result, name, getattr(result, name) + float(getattr(outcome, name)) * tokens)
    result.importance_mean += outcome.importance_mean * tokens
    result.importance_bounded_fraction += outcome.importance_bounded_fraction * tokens
    result.entropy += entropy
    result.mismatch += float(((logprob_MT - packed.engine_logprob_MT).abs() * packed.mask_MT).sum())
    result.mismatch_kl += mismatch_divergence(logprob_MT, packed.engine_logprob_MT, packed.mask_MT) * tokens
    result.num_tokens += tokens
