"""FP8 E4M3 with fine-grained scales (DeepSeek-V3 §3.3.2): weights in blocks of 128 x 128, inputs in tiles of 1 x 128.

`weight = scale * code`. Published checkpoints store the multiplier as `weight_scale_inv`, float32 or a power of two. E4M3
has no infinity; its largest number is 448, and a tensor is scaled so that its largest magnitude meets that.
"""

import torch
from torch import Tensor

BLOCK = 128
TOP = 448.0
CODE_DTYPE = torch.float8_e4m3fn


def quantise_blocks(weight_FD: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn) and float32 scales `[ceil(F/128), ceil(D/128)]` of one matrix; leading dimensions allowed."""
    blocks, rows, cols = _blocks(weight_FD.float())
    scale = _scale(blocks.abs().amax(dim=(-3, -1)), power_of_two)
    code = blocks / scale.unsqueeze(-1).unsqueeze(-3)
    return _unblocked(code, rows, cols).to(CODE_DTYPE), scale


def dequantise_blocks(code_FD: Tensor, scale: Tensor) -> Tensor:
    """The float32 weights; scales as `quantise_blocks` gives them (published: `weight_scale_inv`)."""
    blocks, rows, cols = _blocks(code_FD.float())
    return _unblocked(blocks * scale.float().unsqueeze(-1).unsqueeze(-3), rows, cols)


def quantise_tiles(x_MD: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales `[M, ceil(D/128)]` of inputs."""
    width = x_MD.shape[-1]
    tiles = torch.nn.functional.pad(x_MD.float(), (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = _scale(tiles.abs().amax(dim=-1), power_of_two)
    return (tiles / scale.unsqueeze(-1)).flatten(-2)[..., :width].to(CODE_DTYPE), scale


def dequantise_tiles(code_MD: Tensor, scale: Tensor) -> Tensor:
    """The float32 inputs that codes and scales stand for."""
    width = code_MD.shape[-1]
    tiles = torch.nn.functional.pad(code_MD.float(), (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    return (tiles * scale.unsqueeze(-1)).flatten(-2)[..., :width]


def _scale(top: Tensor, power_of_two: bool) -> Tensor:
    scale = torch.where(top > 0, top / TOP, torch.ones_like(top))
    return torch.exp2(torch.ceil(torch.log2(scale))) if power_of_two else scale


def _blocks(weight_FD: Tensor) -> tuple[Tensor, int, int]:
    """`[..., rows/128, 128, cols/128, 128]`, padded with zeros."""
    rows, cols = weight_FD.shape[-2:]
    padded = torch.nn.functional.pad(weight_FD, (0, -cols % BLOCK, 0, -rows % BLOCK))
    return padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)), rows, cols


def _unblocked(blocks: Tensor, rows: int, cols: int) -> Tensor:
    return blocks.flatten(-2).flatten(-3, -2)[..., :rows, :cols]
