"""Emulation of a tensor core whose accumulator keeps few bits, and of the promotion that mends it (DeepSeek-V3 §3.3.2).

On Hopper an FP8 product aligns 32 terms and the running sum to the largest exponent among them and keeps about 14 bits.
Over long sums the low bits of every term are lost. The published remedy adds the short sum into float32 every 128 terms.
This is arithmetic in float64 that reproduces those steps; nothing here is fast or runs on a tensor core.
"""

import torch
from torch import Tensor

TERMS_AT_ONCE = 32
PROMOTE_EVERY = 128


def limited_product(
    left_MK: Tensor, right_NK: Tensor, *, register_bits: int = 14, promote_every: int | None = PROMOTE_EVERY
) -> Tensor:
    """`left @ right.T` with an accumulator of `register_bits` significant bits, float64 `[M, N]`.

    Args:
        promote_every: terms after which the accumulator is added into float32 and emptied; None never does.
    """
    left_MK, right_NK = left_MK.double(), right_NK.double()
    total_MN = torch.zeros(len(left_MK), len(right_NK), dtype=torch.float64)
    register_MN = torch.zeros_like(total_MN)
    for start in range(0, left_MK.shape[1], TERMS_AT_ONCE):
        stop = start + TERMS_AT_ONCE
        term_MNX = left_MK[:, None, start:stop] * right_NK[None, :, start:stop]
        register_MN = _aligned_sum(torch.cat([term_MNX, register_MN.unsqueeze(-1)], dim=-1), register_bits)
        if promote_every and stop % promote_every == 0:
            total_MN = (total_MN + register_MN).float().double()
            register_MN = torch.zeros_like(register_MN)
    return total_MN + register_MN


def _aligned_sum(term_MNX: Tensor, bits: int) -> Tensor:
    """Truncate every term to the unit that the largest one allows, then add; truncation is towards zero."""
    largest_MN1 = term_MNX.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    unit_MN1 = torch.exp2(torch.floor(torch.log2(largest_MN1)) - (bits - 1))
    return (torch.trunc(term_MNX / unit_MN1) * unit_MN1).sum(dim=-1)
