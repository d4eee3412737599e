"""The definitions that every fast kernel is compared with: plain PyTorch, any device, any dtype, differentiable."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last dimension, times `weight_D`."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight_D, eps)


def swiglu(gate_up_PX: Tensor) -> Tensor:
    """`silu(gate) * up` of rows whose first half is the gate."""
    gate_PF, up_PF = gate_up_PX.chunk(2, dim=-1)
    return silu(gate_PF) * up_PF


def document_attention(
    query_BSHQ: Tensor, key_BSHQ: Tensor, value_BSHU: Tensor, first_BS: Tensor, scale: float
) -> Tensor:
    """Attention of each position to positions `first_BS` up to itself, in the row it stands in: `[B, S, H, U]`."""
    score_BHST = torch.einsum("bshq,bthq->bhst", query_BSHQ, key_BSHQ) * scale
    position_S = torch.arange(query_BSHQ.shape[1], device=query_BSHQ.device)
    visible_BST = (position_S <= position_S.unsqueeze(1)) & (position_S >= first_BS.unsqueeze(-1))
    weight_BHST = score_BHST.masked_fill(~visible_BST.unsqueeze(1), float("-inf")).softmax(dim=-1)
    return torch.einsum("bhst,bthu->bshu", weight_BHST, value_BSHU)


def gather_rows(x_MD: Tensor, token_P: Tensor, dtype: torch.dtype) -> Tensor:
    """Row `token_P[p]` of `x_MD` for every slot p, cast to `dtype`."""
    return x_MD.to(dtype).index_select(0, token_P)


def reduce_slots(x_PD: Tensor, slot_MK: Tensor, weight_MK: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`sum over k of weight[m, k] * x[slot[m, k]]`, accumulated in `dtype`; without weights the plain sum."""
    total_MD = torch.zeros(len(slot_MK), x_PD.shape[1], dtype=dtype, device=x_PD.device)
    for choice, slot_M in enumerate(slot_MK.unbind(1)):
        picked_MD = x_PD.index_select(0, slot_M).to(dtype)
        if weight_MK is None:
            total_MD += picked_MD
        else:
            total_MD.addcmul_(picked_MD, weight_MK[:, choice : choice + 1].to(dtype))
    return total_MD


def reduce_slots_backward(grad_MD: Tensor, x_PD: Tensor, slot_MK: Tensor, weight_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `reduce_slots` for `x_PD` (zero in slots of no token) and `weight_MK`."""
    grad_PD = torch.zeros_like(x_PD)
    columns = []
    for choice, slot_M in enumerate(slot_MK.unbind(1)):
        grad_PD[slot_M] = (grad_MD * weight_MK[:, choice : choice + 1].to(grad_MD.dtype)).to(x_PD.dtype)
        columns.append((x_PD.index_select(0, slot_M).to(grad_MD.dtype) * grad_MD).sum(dim=-1))
    return grad_PD, torch.stack(columns, dim=1).to(weight_MK.dtype)


def cross_entropy_rows_(score_MV: Tensor, label_M: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row in nats and its best token; `score_MV` becomes the gradient, softmax - onehot."""
    wide_MV = score_MV.to(torch.promote_types(score_MV.dtype, torch.float32))
    best_M = wide_MV.argmax(dim=-1)
    log_probability_MV = wide_MV.log_softmax(dim=-1)
    loss_M = -log_probability_MV.gather(1, label_M.unsqueeze(1)).squeeze(1)
    gradient_MV = log_probability_MV.exp_()
    gradient_MV.scatter_add_(1, label_M.unsqueeze(1), gradient_MV.new_full((len(label_M), 1), -1.0))
    score_MV.copy_(gradient_MV)
    return loss_M, best_M


def log_probability_rows(score_MV: Tensor, token_M: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's token under softmax(scores), and the entropy there, in nats."""
    total_M1 = score_MV.logsumexp(dim=-1, keepdim=True)
    logprob_M = (score_MV.gather(1, token_M.unsqueeze(1)) - total_M1).squeeze(1)
    # Entropy is log Z - E[score]: one pass of exponentials, and none over their logarithms.
    return logprob_M, total_M1.squeeze(1) - torch.linalg.vecdot((score_MV - total_M1).exp_(), score_MV)


def sample_rows(logit_NV: Tensor, temperature_N: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row by inverting the cumulated distribution at a given uniform number.

    Args:
        temperature_N: 0 takes the largest score.
        uniform_N: numbers in [0, 1), one per row.
    Returns:
        token, its log-probability (at temperature 1 where it is 0), and whether all scores of the row were finite.
    """
    finite_N = logit_NV.isfinite().all(dim=-1)
    greedy_N = temperature_N == 0
    hot_N = temperature_N.masked_fill(greedy_N, 1.0)
    log_probability_NV = (logit_NV.nan_to_num() / hot_N.unsqueeze(1)).log_softmax(dim=-1)
    cumulative_NV = log_probability_NV.exp().cumsum(dim=-1)
    # The sum may miss 1 by rounding: scale the draw, so that it always falls inside.
    threshold_N1 = uniform_N.to(cumulative_NV.dtype).unsqueeze(1) * cumulative_NV[:, -1:]
    token_N = (cumulative_NV <= threshold_N1).sum(dim=-1).clamp_max(logit_NV.shape[1] - 1)
    token_N = torch.where(greedy_N, logit_NV.argmax(dim=-1), token_N)
    return token_N, log_probability_NV.gather(1, token_N.unsqueeze(1)).squeeze(1), finite_N
