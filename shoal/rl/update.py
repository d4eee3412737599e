"""The learning half of a reinforcement-learning step: rollouts and their advantages in, moved weights out.

Answers without an advantage (every answer of the group scored the same) carry no gradient and are not computed. The rest
are packed several to a row, so that no time goes into padding; log-probabilities are taken at response tokens only. The
multi-token-prediction modules learn from the right answers behind a detached trunk, so that drafts keep up with the
policy they draft for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.model.router import Routing
from shoal.model.transformer import Transformer
from shoal.rl.objective import ObjectiveConfig, ObjectiveResult, policy_objective
from shoal.rl.rollout import Rollouts
from shoal.text.packing import pack_documents
from shoal.training.loss import IGNORED, cross_entropy, labels_ahead, routing_of, token_log_probabilities
from shoal.training.optimizer import OptimizerSet
from shoal.training.step import CountTracker, finish_step


@dataclass
class UpdateResult:
    """What one update did; fractions and means over response tokens that were computed."""

    grad_norm: float | None = None
    loss: float = 0.0
    clip_fraction: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    mismatch: float = 0.0
    """Mean |log-probability of the engine - of the trainer| before the update: what sampling and learning disagree by."""
    num_tokens: int = 0
    max_violation: float | None = None


@dataclass
class PackedRollouts:
    """Several answers per row. Response token `t` of answer `i` is predicted at flat row position `place_MT[i, t]`."""

    token_BS: Tensor
    document_BS: Tensor
    position_BS: Tensor
    label_BS: Tensor
    """Next token at response positions of right answers, for the MTP loss; ignored elsewhere."""
    response_MT: Tensor
    place_MT: Tensor
    mask_MT: Tensor
    old_logprob_MT: Tensor


def pack_rollouts(rollouts: Rollouts, chosen: Sequence[int], right: Sequence[bool], row_tokens: int) -> PackedRollouts:
    """Lay the chosen answers (prompt and response each) out in rows of `row_tokens` or less."""
    longest = max(len(rollouts.completions[i].token_ids) for i in chosen)
    lengths = [len(rollouts.prompt_ids[i]) + len(rollouts.completions[i].token_ids) for i in chosen]
    rows = pack_documents(lengths, max(row_tokens, max(lengths)), seed=0)
    width = max(sum(lengths[item] for item in row) for row in rows)
    shape, answers = (len(rows), width), (len(chosen), longest)
    token, label, document, position = (
        np.zeros(shape, np.int64),
        np.full(shape, IGNORED),
        np.full(shape, -1),
        np.zeros(shape, np.int64),
    )
    response, place, mask = np.zeros(answers, np.int64), np.zeros(answers, np.int64), np.zeros(answers, bool)
    old = np.zeros(answers, np.float32)
    for row, items in enumerate(rows):
        at = 0
        for number, item in enumerate(items):
            prompt = rollouts.prompt_ids[chosen[item]]
            completion = rollouts.completions[chosen[item]]
            ids, count = [*prompt, *completion.token_ids], len(completion.token_ids)
            here = slice(at, at + len(ids))
            token[row, here], document[row, here], position[row, here] = ids, number, range(len(ids))
            first = at + len(prompt) - 1
            response[item, :count], old[item, :count], mask[item, :count] = (
                completion.token_ids,
                completion.logprobs,
                True,
            )
            place[item, :count] = row * width + first + np.arange(count)
            if right[chosen[item]]:
                label[row, first : first + count] = completion.token_ids
            at += len(ids)
    arrays = (token, document, position, label, response, place, mask, old)
    return PackedRollouts(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def update_policy(
    model: Transformer,
    optimizers: OptimizerSet,
    rollouts: Rollouts,
    advantage_M: Tensor,
    right: Sequence[bool],
    objective: ObjectiveConfig,
    *,
    row_tokens: int,
    micro_batch_answers: int,
    temperature: float,
    bias_speed: float,
    mtp_weight: float,
    reference: Transformer | None = None,
) -> UpdateResult:
    """One optimizer step on these answers.

    The normaliser counts every answer of the batch, also those left out for want of an advantage, so the gradient does
    not depend on how answers are cut into micro-batches.
    """
    result = UpdateResult()
    needs_all = objective.kl_coefficient > 0
    chosen = [i for i in range(len(advantage_M)) if needs_all or float(advantage_M[i]) != 0.0]
    if not chosen:
        return result
    chosen.sort(key=lambda i: len(rollouts.completions[i].token_ids))
    total_tokens = rollouts.num_response_tokens
    tracker = CountTracker(model)
    for start in range(0, len(chosen), micro_batch_answers):
        part = chosen[start : start + micro_batch_answers]
        packed = pack_rollouts(rollouts, part, right, row_tokens)
        routing = routing_of(packed.token_BS, packed.document_BS)
        hidden_BSD = model(
            packed.token_BS, position_BS=packed.position_BS, document_BS=packed.document_BS, routing=routing
        )
        logprob_MT, entropy = _response_log_probabilities(model, hidden_BSD, packed, temperature)
        reference_MT = _reference_log_probabilities(reference, packed, temperature)
        outcome = policy_objective(
            logprob_MT,
            packed.old_logprob_MT,
            advantage_M[part],
            packed.mask_MT,
            objective,
            reference_logprob_MT=reference_MT,
            num_tokens_total=total_tokens,
            num_sequences_total=len(advantage_M),
        )
        loss = outcome.loss
        if mtp_weight and model.config.num_nextn_predict_layers:
            loss = loss + mtp_weight * _draft_loss(model, hidden_BSD, packed, routing, total_tokens)
        loss.backward()
        tracker.add(routing)
        _accumulate(result, outcome, logprob_MT.detach(), packed, entropy)
    result.grad_norm = finish_step(model, optimizers, tracker, bias_speed)
    if tracker.layers:
        load_LE = tracker.count_LE.double()
        result.max_violation = float(((load_LE.amax(-1) - load_LE.mean(-1)) / load_LE.mean(-1)).max())
    for name in ("clip_fraction", "kl", "entropy", "mismatch"):
        setattr(result, name, getattr(result, name) / max(result.num_tokens, 1))
    return result


def _response_log_probabilities(
    model: Transformer, hidden_BSD: Tensor, packed: PackedRollouts, temperature: float
) -> tuple[Tensor, float]:
    """Log-probabilities of the responses `[M, T]`, zero outside the mask, and the summed entropy."""
    place_N = packed.place_MT[packed.mask_MT]
    hidden_ND = hidden_BSD.reshape(-1, hidden_BSD.shape[-1]).index_select(0, place_N)
    logprob_N, entropy_N = token_log_probabilities(model, hidden_ND, packed.response_MT[packed.mask_MT], temperature)
    logprob_MT = torch.zeros_like(packed.old_logprob_MT).masked_scatter(packed.mask_MT, logprob_N)
    return logprob_MT, float(entropy_N.sum())


@torch.no_grad()
def _reference_log_probabilities(
    reference: Transformer | None, packed: PackedRollouts, temperature: float
) -> Tensor | None:
    if reference is None:
        return None
    hidden_BSD = reference(packed.token_BS, position_BS=packed.position_BS, document_BS=packed.document_BS)
    return _response_log_probabilities(reference, hidden_BSD, packed, temperature)[0]


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
    result.clip_fraction += float(outcome.clip_fraction) * tokens
    result.kl += float(outcome.kl) * tokens
    result.entropy += entropy
    result.mismatch += float(((logprob_MT - packed.old_logprob_MT).abs() * packed.mask_MT).sum())
    result.num_tokens += tokens
