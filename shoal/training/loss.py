"""Cross-entropy without the array of logits, and the training objective built from it.

The head of a language model makes `[tokens, vocabulary]` numbers that are used once. Here they exist one chunk at a time,
and their gradient is taken in the same pass, so the peak is one chunk (the idea of fused linear cross-entropy kernels).
The same function serves the main head and every multi-token-prediction depth.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.kernels import products
from shoal.kernels.dispatch import cross_entropy_rows_, log_probability_rows
from shoal.model.load_balance import auxiliary_loss, sequence_balance_loss
from shoal.model.router import Routing
from shoal.model.transformer import Transformer

IGNORED = -100
"""Label of a position that no loss is taken at."""

CHUNK_ELEMENTS = 4_194_304
"""Logits alive at once."""

RULED_OUT = -1e4
"""A score whose exponential is zero beside any other; finite, so that zero times it is zero."""


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy over rows, with the head product inside."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, label_M: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        low_weight = weight_VD.to(dtype)
        needs_grad = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden_MD) if needs_grad else None
        grad_weight = torch.zeros_like(weight_VD) if needs_grad else None
        total, best_M = hidden_MD.new_zeros(()), torch.empty_like(label_M)
        for chunk in _chunks(len(label_M), len(weight_VD)):
            low_hidden, label = hidden_MD[chunk].to(dtype), label_M[chunk]
            score_MV = torch.mm(low_hidden, low_weight.t())
            loss_M, best_M[chunk] = cross_entropy_rows_(score_MV, label)
            total += loss_M.sum()
            if grad_hidden is not None and grad_weight is not None:  # the scores have become their own gradient
                grad_hidden[chunk] = torch.mm(score_MV, low_weight).to(hidden_MD.dtype)
                grad_weight += torch.mm(score_MV.t(), low_hidden).to(weight_VD.dtype)
        ctx.save_for_backward(*(t for t in (grad_hidden, grad_weight) if t is not None))
        ctx.mark_non_differentiable(best_M)
        return total, best_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None, None


@dataclass
class TokenLoss:
    """Cross-entropy over the labelled positions of a batch."""

    total: Tensor
    """Sum in nats, differentiable."""
    num_tokens: int
    best_BS: Tensor
    """The token ranked first at each labelled position, -1 elsewhere."""


def cross_entropy(model: Transformer, hidden_BSD: Tensor, label_BS: Tensor, *, detach_head: bool = False) -> TokenLoss:
    """Cross-entropy of the labels that are not `IGNORED`; zero with zero gradient when there are none."""
    label_M = label_BS.reshape(-1)
    kept_M = (label_M != IGNORED).nonzero().squeeze(1)
    hidden_MD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    if len(kept_M) < len(label_M):
        hidden_MD, label_M = hidden_MD.index_select(0, kept_M), label_M.index_select(0, kept_M)
    weight_VD = model.head_weight_VD.detach() if detach_head else model.head_weight_VD
    dtype = _head_dtype(model, hidden_MD)
    fused = products.head_cross_entropy(hidden_MD, weight_VD, label_M) if dtype == torch.bfloat16 else None
    total, best_M = fused or ChunkedCrossEntropy.apply(hidden_MD, weight_VD, label_M, dtype)
    best_BS = torch.full_like(label_BS, -1).reshape(-1).scatter_(0, kept_M, best_M).view_as(label_BS)
    return TokenLoss(total=total, num_tokens=len(label_M), best_BS=best_BS)


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How the parts add up. Published values: V3 §4.2."""

    mtp: float = 0.3
    """Lambda: weight of multi-token prediction, averaged over depths."""
    sequence_balance: float = 1e-4
    """Alpha of the complementary sequence-wise balance loss."""
    auxiliary: float = 0.0
    """Alpha of the classic balance loss; for the comparison without bias updates."""


@dataclass
class BatchLoss:
    """Everything one forward pass yields."""

    objective: Tensor
    """What is differentiated: mean main loss plus weighted parts, times this batch's share of the step's tokens."""
    main: TokenLoss
    mtp: list[TokenLoss]
    balance: float
    routing: Routing


def batch_loss(
    model: Transformer,
    token_BS: Tensor,
    label_BS: Tensor,
    document_BS: Tensor | None,
    position_BS: Tensor | None,
    *,
    weights: LossWeights,
    step_tokens: int,
) -> BatchLoss:
    """The objective of one micro-batch.

    Args:
        label_BS: next token of each position, `IGNORED` where none counts.
        document_BS: document number inside the row, negative for padding.
        step_tokens: labels that count in the whole optimizer step, all micro-batches together: dividing by it makes the
            gradient independent of how the step is cut up.
    """
    config = model.config
    routing = routing_of(token_BS, document_BS)
    hidden_BSD = model(token_BS, position_BS=position_BS, document_BS=document_BS, routing=routing)
    main = cross_entropy(model, hidden_BSD, label_BS)
    objective = main.total / step_tokens
    mtp = []
    if weights.mtp and config.num_nextn_predict_layers:
        heads = model.predict_ahead(
            hidden_BSD, token_BS, position_BS=position_BS, document_BS=document_BS, routing=routing
        )
        mtp = [
            cross_entropy(model, head_BSD, labels_ahead(label_BS, document_BS, k))
            for k, head_BSD in enumerate(heads, 1)
        ]
        objective = (
            objective + weights.mtp / len(mtp) * sum((part.total for part in mtp), torch.zeros(())) / step_tokens
        )
    balance = 0.0
    if routing.score_LME:
        share = main.num_tokens / step_tokens
        loss = sequence_balance_loss(routing, config)
        balance = float(loss.detach()) / len(routing.score_LME)
        objective = objective + weights.sequence_balance * share * loss
        if weights.auxiliary:
            objective = objective + weights.auxiliary * share * auxiliary_loss(routing, config)
    return BatchLoss(objective=objective, main=main, mtp=mtp, balance=balance, routing=routing)


def routing_of(token_BS: Tensor, document_BS: Tensor | None) -> Routing:
    """An empty record that knows padding and sequences of this batch."""
    if document_BS is None:
        row_M = torch.arange(len(token_BS), device=token_BS.device).repeat_interleave(token_BS.shape[1])
        return Routing(sequence_M=row_M)
    row_B1 = torch.arange(len(token_BS), device=token_BS.device).unsqueeze(1)
    documents = int(document_BS.max()) + 1
    return Routing(
        token_mask_M=(document_BS >= 0).reshape(-1), sequence_M=(row_B1 * documents + document_BS).reshape(-1)
    )


def labels_ahead(label_BS: Tensor, document_BS: Tensor | None, depth: int) -> Tensor:
    """Labels of MTP depth `depth`: the token `depth` further on, masked at row ends and document borders."""
    ahead_BS = torch.full_like(label_BS, IGNORED)
    ahead_BS[:, :-depth] = label_BS[:, depth:]
    if document_BS is not None:
        same_BS = torch.zeros_like(document_BS, dtype=torch.bool)
        same_BS[:, :-depth] = (document_BS[:, depth:] == document_BS[:, :-depth]) & (document_BS[:, depth:] >= 0)
        ahead_BS = ahead_BS.masked_fill(~same_BS, IGNORED)
    return ahead_BS


def mtp_acceptance(main: TokenLoss, mtp: list[TokenLoss]) -> list[tuple[int, int]]:
    """Per depth, (accepted, drafted): how often the draft equals what the main head ranks first at that place.

    This is the acceptance of greedy speculative decoding along the given text; depth k drafts position i + k from i.
    """
    rates = []
    for depth, part in enumerate(mtp, start=1):
        draft_BS, truth_BS = part.best_BS[:, :-depth], main.best_BS[:, depth:]
        drafted_BS = (draft_BS >= 0) & (truth_BS >= 0)
        rates.append((int(((draft_BS == truth_BS) & drafted_BS).sum()), int(drafted_BS.sum())))
    return rates


class ChunkedLogProbability(torch.autograd.Function):
    """Log-probability of one token per row under the head, and the entropy there; logits exist a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        token_M: Tensor,
        temperature: float,
        dtype: torch.dtype,
        kept_MV: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        low_weight = weight_VD.to(dtype)
        logprob_M, entropy_M = hidden_MD.new_empty(len(token_M)), hidden_MD.new_empty(len(token_M))
        for chunk in _chunks(len(token_M), len(weight_VD)):
            kept = None if kept_MV is None else kept_MV[chunk]
            score_MV = _scores(hidden_MD[chunk], low_weight, temperature, kept)
            logprob_M[chunk], entropy_M[chunk] = log_probability_rows(score_MV, token_M[chunk])
        ctx.save_for_backward(hidden_MD, weight_VD, token_M)
        ctx.temperature, ctx.dtype, ctx.kept_MV = temperature, dtype, kept_MV
        ctx.mark_non_differentiable(entropy_M)
        return logprob_M, entropy_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden_MD, weight_VD, token_M = ctx.saved_tensors
        low_weight = weight_VD.to(ctx.dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden_MD), torch.zeros_like(weight_VD)
        for chunk in _chunks(len(token_M), len(weight_VD)):
            kept = None if ctx.kept_MV is None else ctx.kept_MV[chunk]
            score_MV = _scores(hidden_MD[chunk], low_weight, ctx.temperature, kept)
            cross_entropy_rows_(score_MV, token_M[chunk])  # the scores have become softmax - onehot
            low_grad = score_MV.mul_((-grads[0][chunk] / ctx.temperature).unsqueeze(1)).to(ctx.dtype)
            grad_hidden[chunk] = torch.mm(low_grad, low_weight).to(hidden_MD.dtype)
            grad_weight += torch.mm(low_grad.t(), hidden_MD[chunk].to(ctx.dtype)).to(weight_VD.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def token_log_probabilities(
    model: Transformer,
    hidden_MD: Tensor,
    token_M: Tensor,
    temperature: float = 1.0,
    *,
    kept_MV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of `token_M` (differentiable) and entropy in nats (not) at each row, both `[M]`.

    Args:
        kept_MV: true at the tokens that a sampler's top-p and top-k had left; the distribution is theirs alone.
    """
    dtype, weight_VD = _head_dtype(model, hidden_MD), model.head_weight_VD
    if dtype == torch.bfloat16 and kept_MV is None:
        fused = products.head_log_probability(hidden_MD, weight_VD, token_M, temperature)
        if fused is not None:
            return fused
    found: tuple[Tensor, Tensor] = ChunkedLogProbability.apply(
        hidden_MD, weight_VD, token_M, temperature, dtype, kept_MV
    )
    return found


def _scores(hidden_MD: Tensor, low_weight: Tensor, temperature: float, kept_MV: Tensor | None) -> Tensor:
    """Logits over temperature in the dtype of the hidden states; what no sampler could draw is far below all others."""
    score_MV = torch.mm(hidden_MD.to(low_weight.dtype), low_weight.t()).to(hidden_MD.dtype)
    if temperature != 1:
        score_MV.div_(temperature)
    return score_MV if kept_MV is None else score_MV.masked_fill_(~kept_MV, RULED_OUT)


def _chunks(num_rows: int, vocabulary: int) -> list[slice]:
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + rows) for start in range(0, num_rows, rows)]


def _head_dtype(model: Transformer, hidden: Tensor) -> torch.dtype:
    return (model.lm_head.compute_dtype if model.lm_head is not None else None) or hidden.dtype
