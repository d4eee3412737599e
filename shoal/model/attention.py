"""Attention itself: queries, keys and values of equal heads, through whatever is fastest for their shape.

Packed rows of short documents go through our CPU kernel, which only computes inside each document; everything else goes
through PyTorch's fused attention. High precision, as the published recipe has it: float32 softmax and sums everywhere, and
products in float32, or in bfloat16 by our kernel where the layer's products are (PyTorch's bfloat16 form is slower on CPUs).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from shoal.kernels.dispatch import document_attention
from shoal.model.visibility import Visibility

KERNEL_UP_TO_POSITIONS = 512
"""Rows longer than this go to the fused kernel, whose tiles pay off there."""


def attend(
    query_BSHQ: Tensor,
    key_BTHQ: Tensor,
    value_BTHU: Tensor,
    visibility: Visibility,
    scale: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Softmax attention, `[B, S, H, U]`; `dtype` is what the products may be taken in."""
    first_BS = visibility.first_BS
    if first_BS is not None and query_BSHQ.shape[1] <= KERNEL_UP_TO_POSITIONS:
        heads = (query_BSHQ.contiguous(), key_BTHQ.contiguous(), value_BTHU)
        mixed_BSHU = document_attention(*heads, first_BS, scale, dtype)
        if mixed_BSHU is not None:
            return mixed_BSHU
    mask_BST = visibility.mask_BST
    # The fused CPU kernel wants equal key and value widths; zeros in the value change nothing and are cut off.
    missing = query_BSHQ.shape[-1] - value_BTHU.shape[-1]
    out_BHSU = scaled_dot_product_attention(
        query_BSHQ.transpose(1, 2),
        key_BTHQ.transpose(1, 2),
        pad(value_BTHU, (0, max(missing, 0))).transpose(1, 2),
        attn_mask=None if mask_BST is None else mask_BST.unsqueeze(1),
        is_causal=mask_BST is None,
        scale=scale,
    )
    mixed: Tensor = out_BHSU[..., : value_BTHU.shape[-1]].transpose(1, 2)
    return mixed
