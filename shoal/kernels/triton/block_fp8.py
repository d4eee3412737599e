"""Block-FP8 matrix products: codes with 1 x 128 and 128 x 128 scales, one matrix or one per group of rows.

Each step multiplies 128 columns of codes and adds the short sum, times its scales, into a float32 accumulator: the
promotion of DeepSeek-V3 §3.3.2, at the interval at which scales change anyway. Groups are blocks of consecutive rows
(tokens sorted by expert); a program looks up which expert its tile of rows belongs to, so one launch does all experts,
empty ones included.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
ROW_TILE = 64
COLUMN_TILE = 64


@triton.jit
def _scaled_tile(  # type: ignore[no-untyped-def]
    left, left_scale, right, right_scale, out, row, row_stop, column, num_columns, depth,
    left_step, left_scale_step, right_step, right_inner, right_scale_step, right_scale_inner, out_step,
    RIGHT_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of `left @ right.T`, rows `row` below `row_stop`."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    inner = tl.arange(0, DEPTH)
    in_rows, in_columns = row < row_stop, column < num_columns
    for block in range(tl.cdiv(depth, DEPTH)):
        at = block * DEPTH + inner
        in_depth = at < depth
        left_code = tl.load(
            left + row[:, None] * left_step + at[None, :], mask=in_rows[:, None] & in_depth[None, :], other=0.0
        )
        right_code = tl.load(
            right + column[None, :] * right_step + at[:, None] * right_inner,
            mask=in_columns[None, :] & in_depth[:, None],
            other=0.0,
        )
        left_factor = tl.load(left_scale + row * left_scale_step + block, mask=in_rows, other=0.0)
        right_factor = tl.load(
            right_scale + (column // RIGHT_ROWS) * right_scale_step + block * right_scale_inner,
            mask=in_columns,
            other=0.0,
        )
        total += tl.dot(left_code, right_code, out_dtype=tl.float32) * left_factor[:, None] * right_factor[None, :]
    tl.store(out + row[:, None] * out_step + column[None, :], total, mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def _grouped_kernel(  # type: ignore[no-untyped-def]
    left, left_scale, right, right_scale, out, tile_expert, tile_start, tile_stop, num_columns, depth,
    left_step, left_scale_step, right_expert, right_step, right_inner,
    right_scale_expert, right_scale_step, right_scale_inner, out_step,
    RIGHT_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    row = tl.load(tile_start + tile) + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    _scaled_tile(
        left, left_scale, right + expert * right_expert, right_scale + expert * right_scale_expert, out,
        row, tl.load(tile_stop + tile), column, num_columns, depth,
        left_step, left_scale_step, right_step, right_inner, right_scale_step, right_scale_inner, out_step,
        RIGHT_ROWS, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip


def scaled_matmul(code_MK: Tensor, scale: Tensor, right_NK: Tensor, right_scale: Tensor, block_rows: int) -> Tensor:
    """`left @ right.T` in float32; `block_rows` rows of the right side share a scale (1 or 128)."""
    whole = [(0, len(code_MK))]
    return _launch(code_MK, scale, right_NK.unsqueeze(0), right_scale.unsqueeze(0), block_rows, whole)


def grouped_scaled_matmul(
    code_PK: Tensor, scale: Tensor, right_ENK: Tensor, right_scale: Tensor, groups: list[tuple[int, int]]
) -> Tensor:
    """Each block of rows times its own matrix of the stack, whose scales are 128 x 128 blocks; float32 `[P, N]`."""
    return _launch(code_PK, scale, right_ENK, right_scale, BLOCK, groups)


def row_tiles(groups: list[tuple[int, int]], rows: int) -> list[tuple[int, int, int]]:
    """Expert, first row and stop of every tile of at most `rows` rows; empty groups have none."""
    return [(expert, start, stop) for expert, (begin, stop) in enumerate(groups) for start in range(begin, stop, rows)]


def _launch(
    left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, block_rows: int, groups: list[tuple[int, int]]
) -> Tensor:
    left, left_scale = left.contiguous(), left_scale.contiguous()
    out = torch.zeros(len(left), right.shape[1], device=left.device)
    tiles = row_tiles(groups, ROW_TILE)
    if not tiles:
        return out
    tile_expert, tile_start, tile_stop = torch.tensor(tiles, dtype=torch.int64, device=left.device).t().contiguous()
    grid = (len(tiles), triton.cdiv(right.shape[1], COLUMN_TILE))
    kernel: Any = _grouped_kernel
    kernel[grid](
        left, left_scale, right, right_scale, out, tile_expert, tile_start, tile_stop, right.shape[1], left.shape[1],
        left.stride(0), left_scale.stride(0), right.stride(0), right.stride(1), right.stride(2),
        right_scale.stride(0), right_scale.stride(1), right_scale.stride(2), out.stride(0),
        RIGHT_ROWS=block_rows, ROWS=ROW_TILE, COLUMNS=COLUMN_TILE, DEPTH=BLOCK,
    )  # fmt: skip
    return out
