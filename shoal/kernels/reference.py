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
