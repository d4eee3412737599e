"""Absorbed latent attention of one new token per sequence over paged latents.

The latents are one key-value head of width `C + R` whose first `C` numbers are also the values, so a page is read once for
scores and mixture. The context is cut into splits that run beside one another (few sequences must fill a GPU); each leaves
a mixture and a log-sum-exp, and a second kernel joins them (FlashDecoding). Heads are padded to a power of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS_AT_ONCE = 16
SPLIT_TOKENS = 256
"""Positions that one program reads."""


@triton.jit
def _split_kernel(  # type: ignore[no-untyped-def]
    query, page, table, length, mixed, log_sum, scale, heads, latent, width, page_tokens,
    query_step, query_head, page_step, position_step, table_step, mixed_step, mixed_split, mixed_head,
    sum_step, sum_split,
    HEADS: tl.constexpr, LATENT: tl.constexpr, ROTARY: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0), tl.program_id(1)
    head, column, turned = tl.arange(0, HEADS), tl.arange(0, LATENT), tl.arange(0, ROTARY)
    in_latent, in_rotary = column < latent, latent + turned < width
    start_of_query = query + row * query_step + head[:, None] * query_head
    plain = tl.load(start_of_query + column[None, :], mask=(head < heads)[:, None] & in_latent[None, :], other=0.0)
    rotary = tl.load(
        start_of_query + latent + turned[None, :], mask=(head < heads)[:, None] & in_rotary[None, :], other=0.0
    )
    context = tl.load(length + row)
    largest = tl.full((HEADS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((HEADS,), dtype=tl.float32)
    mixture = tl.zeros((HEADS, LATENT), dtype=tl.float32)
    start = split * SPLIT
    for block in range(tl.cdiv(tl.minimum(SPLIT, tl.maximum(context - start, 0)), TOKENS)):
        position = start + block * TOKENS + tl.arange(0, TOKENS)
        inside = position < context
        number = tl.load(table + row * table_step + position // page_tokens, mask=inside, other=0)
        entry = page + number.to(tl.int64) * page_step + (position % page_tokens) * position_step
        latents = tl.load(entry[:, None] + column[None, :], mask=inside[:, None] & in_latent[None, :], other=0.0)
        keys = tl.load(entry[:, None] + latent + turned[None, :], mask=inside[:, None] & in_rotary[None, :], other=0.0)
        score = tl.dot(plain, tl.trans(latents), input_precision="ieee")
        score += tl.dot(rotary, tl.trans(keys), input_precision="ieee")
        score = tl.where(inside[None, :], score * scale, float("-inf"))
        now = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.exp(score - now[:, None])
        shrink = tl.exp(largest - now)
        total = total * shrink + tl.sum(weight, axis=1)
        mixture = mixture * shrink[:, None]
        mixture += tl.dot(weight.to(latents.dtype), latents, input_precision="ieee")
        largest = now
    safe = tl.where(total > 0, total, 1.0)
    target = mixed + row * mixed_step + split * mixed_split + head[:, None] * mixed_head
    tl.store(target + column[None, :], mixture / safe[:, None], mask=(head < heads)[:, None] & in_latent[None, :])
    value = tl.where(total > 0, largest + tl.log(safe), float("-inf"))
    tl.store(log_sum + row * sum_step + split * sum_split + head, value, mask=head < heads)


def mla_decode(
    query_BHW: Tensor, pool_PTW: Tensor, table_BX: Tensor, length_B: Tensor, *, latent: int, scale: float
) -> Tensor:
    """Mixture of latents `[B, H, C]`, float32, for one query per sequence and head.

    Args:
        query_BHW: queries lifted into latent space, then their rotary part.
        pool_PTW: pages of entries `latent + rotary`; positions of sequence b lie on pages `table_BX[b]` in order.
        length_B: positions to attend to, at least 1.
        latent: C, the width that scores and is mixed; the rest of an entry only scores.
    """
    rows, heads, width = query_BHW.shape
    query_BHW, table_BX = query_BHW.contiguous(), table_BX.contiguous()
    splits = triton.cdiv(int(length_B.max()), SPLIT_TOKENS)
    mixed = torch.empty(rows, splits, heads, latent, device=query_BHW.device)
    log_sum = torch.empty(rows, splits, heads, device=query_BHW.device)
    kernel: Any = _split_kernel
    kernel[(rows, splits)](
        query_BHW, pool_PTW, table_BX, length_B, mixed, log_sum, scale, heads, latent, width, pool_PTW.shape[1],
        query_BHW.stride(0), query_BHW.stride(1), pool_PTW.stride(0), pool_PTW.stride(1), table_BX.stride(0),
        mixed.stride(0), mixed.stride(1), mixed.stride(2), log_sum.stride(0), log_sum.stride(1),
        HEADS=max(16, triton.next_power_of_2(heads)), LATENT=max(16, triton.next_power_of_2(latent)),
        ROTARY=max(16, triton.next_power_of_2(width - latent)), TOKENS=TOKENS_AT_ONCE, SPLIT=SPLIT_TOKENS,
    )  # fmt: skip
    # A few numbers per head: PyTorch joins them as fast as another kernel would.
    weight = log_sum.softmax(dim=1).unsqueeze(-1)
    return (mixed * weight).sum(dim=1)
