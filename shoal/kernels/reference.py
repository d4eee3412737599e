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
