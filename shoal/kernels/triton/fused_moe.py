"""The routed experts in two launches: gate, up and SiLU in one pass over sorted rows, then the down projection.

The first kernel reads a tile of tokens through the sorted order, multiplies it with the gate and the up rows of its expert
side by side and writes only `silu(gate) * up`; the products themselves never reach memory. The second multiplies that by
the down projection, weighs each row with its routing weight and adds it to its token. Weights may be any float type;
products accumulate in float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.triton.block_fp8 import row_tiles

ROW_TILE = 32
COLUMN_TILE = 32
DEPTH_TILE = 64


@triton.jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x, token, gate_up, act, tile_expert, tile_start, tile_stop, width, depth,
    x_step, expert_step, row_step, act_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    slot = tl.load(tile_start + tile) + tl.arange(0, ROWS)
    in_rows = slot < tl.load(tile_stop + tile)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < width
    source = tl.load(token + slot, mask=in_rows, other=0)
    weight = gate_up + tl.load(tile_expert + tile) * expert_step
    gate, up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32), tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for block in range(tl.cdiv(depth, DEPTH)):
        at = block * DEPTH + tl.arange(0, DEPTH)
        rows = tl.load(
            x + source[:, None] * x_step + at[None, :], mask=in_rows[:, None] & (at < depth)[None, :], other=0.0
        )
        inside = in_columns[None, :] & (at < depth)[:, None]
        gate_weight = tl.load(weight + column[None, :] * row_step + at[:, None], mask=inside, other=0.0)
        up_weight = tl.load(weight + (width + column)[None, :] * row_step + at[:, None], mask=inside, other=0.0)
        gate = tl.dot(rows, gate_weight, gate, input_precision="ieee")
        up = tl.dot(rows, up_weight, up, input_precision="ieee")
    value = gate * tl.sigmoid(gate) * up
    tl.store(
        act + slot[:, None] * act_step + column[None, :],
        value.to(act.dtype.element_ty),
        mask=in_rows[:, None] & in_columns[None, :],
    )


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    act, down, routing, token, out, tile_expert, tile_start, tile_stop, hidden, width,
    act_step, expert_step, row_step, out_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    slot = tl.load(tile_start + tile) + tl.arange(0, ROWS)
    in_rows = slot < tl.load(tile_stop + tile)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < hidden
    weight = down + tl.load(tile_expert + tile) * expert_step
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for block in range(tl.cdiv(width, DEPTH)):
        at = block * DEPTH + tl.arange(0, DEPTH)
        rows = tl.load(
            act + slot[:, None] * act_step + at[None, :], mask=in_rows[:, None] & (at < width)[None, :], other=0.0
        )
        columns = tl.load(
            weight + column[None, :] * row_step + at[:, None],
            mask=in_columns[None, :] & (at < width)[:, None],
            other=0.0,
        )
        total = tl.dot(rows, columns, total, input_precision="ieee")
    share = tl.load(routing + slot, mask=in_rows, other=0.0)
    target = tl.load(token + slot, mask=in_rows, other=0)
    tl.atomic_add(
        out + target[:, None] * out_step + column[None, :],
        total * share[:, None],
        mask=in_rows[:, None] & in_columns[None, :],
    )


def fused_moe(x_MD: Tensor, gate_up_EXD: Tensor, down_EDF: Tensor, weight_MK: Tensor, expert_MK: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs, float32 `[M, D]`.

    Args:
        gate_up_EXD: gate rows first, `[E, 2F, D]`, contiguous, as `down_EDF` is.
    """
    experts, width = len(gate_up_EXD), down_EDF.shape[2]
    choices = expert_MK.shape[1]
    order = expert_MK.reshape(-1).argsort(stable=True)
    token_P, routing_P = order // choices, weight_MK.reshape(-1)[order].float().contiguous()
    stops = torch.bincount(expert_MK.reshape(-1), minlength=experts).cumsum(0).tolist()
    tiles = row_tiles(list(zip([0, *stops[:-1]], stops)), ROW_TILE)
    x_MD = x_MD.contiguous()
    out_MD = torch.zeros(x_MD.shape, dtype=torch.float32, device=x_MD.device)
    if not tiles:
        return out_MD
    columns = torch.tensor(tiles, dtype=torch.int64, device=x_MD.device).t().contiguous()
    act_PF = torch.empty(len(order), width, dtype=x_MD.dtype, device=x_MD.device)
    sizes: dict[str, Any] = {"ROWS": ROW_TILE, "COLUMNS": COLUMN_TILE, "DEPTH": DEPTH_TILE}
    first: Any = _gate_up_kernel
    first[(len(tiles), triton.cdiv(width, COLUMN_TILE))](
        x_MD, token_P, gate_up_EXD, act_PF, *columns, width, x_MD.shape[1],
        x_MD.stride(0), gate_up_EXD.stride(0), gate_up_EXD.stride(1), act_PF.stride(0), **sizes,
    )  # fmt: skip
    second: Any = _down_kernel
    second[(len(tiles), triton.cdiv(x_MD.shape[1], COLUMN_TILE))](
        act_PF, down_EDF, routing_P, token_P, out_MD, *columns, x_MD.shape[1], width,
        act_PF.stride(0), down_EDF.stride(0), down_EDF.stride(1), out_MD.stride(0), **sizes,
    )  # fmt: skip
    return out_MD
