"""FP8 E4M3 with fine-grained scales (DeepSeek-V3 §3.3.2): weights in blocks of 128 x 128, inputs in tiles of 1 x 128.

`weight = scale * code`. Published checkpoints store the multiplier as `weight_scale_inv`, float32 or a power of two. E4M3
has no infinity; its largest number is 448, and a tensor is scaled so that its largest magnitude meets that.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
TOP = 448.0
CODE_DTYPE = torch.float8_e4m3fn


@dataclass(frozen=True)
class Scaled:
    """One factor of a product `left @ right.T`: codes `[rows, K]`, and scales of every 128 columns of `block_rows` rows."""

    code: Tensor
    scale: Tensor
    block_rows: int
    """1 for tiles, 128 for blocks."""

    def floats(self) -> Tensor:
        """The float32 numbers that are meant."""
        return (dequantise_tiles if self.block_rows == 1 else dequantise_blocks)(self.code, self.scale)

    def turned(self) -> "Scaled":
        """The transpose; blocks only, tiles must be quantised again along their other axis."""
        assert self.block_rows == BLOCK
        return Scaled(self.code.transpose(-1, -2), self.scale.transpose(-1, -2), BLOCK)

    def __getitem__(self, rows: slice | int) -> "Scaled":
        """Some rows of tiles, or one matrix of a stack of blocks."""
        return Scaled(self.code[rows], self.scale[rows], self.block_rows)


def tiles(x_MD: Tensor, power_of_two: bool = False) -> Scaled:
    """Inputs or gradients as codes in tiles of 1 x 128."""
    return Scaled(*quantise_tiles(x_MD, power_of_two), 1)


def blocks(weight_FD: Tensor, power_of_two: bool = False) -> Scaled:
    """Weights as codes in blocks of 128 x 128."""
    return Scaled(*quantise_blocks(weight_FD, power_of_two), BLOCK)


def product(left: Scaled, right: Scaled) -> Tensor:
    """`left @ right.T` of what the codes stand for, accumulated in float32: the definition of an FP8 product."""
    return left.floats() @ right.floats().transpose(-1, -2)


def quantise_blocks(weight_FD: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn) and float32 scales `[ceil(F/128), ceil(D/128)]` of one matrix; leading dimensions allowed."""
    cut, rows, cols = _blocks(weight_FD.float())
    scale = _scale(cut.abs().amax(dim=(-3, -1)), power_of_two)
    code = cut / scale.unsqueeze(-1).unsqueeze(-3)
    return _unblocked(code, rows, cols).to(CODE_DTYPE), scale


def dequantise_blocks(code_FD: Tensor, scale: Tensor) -> Tensor:
    """The float32 weights; scales as `quantise_blocks` gives them (published: `weight_scale_inv`)."""
    cut, rows, cols = _blocks(code_FD.float())
    return _unblocked(cut * scale.float().unsqueeze(-1).unsqueeze(-3), rows, cols)


def quantise_tiles(x_MD: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales `[M, ceil(D/128)]` of inputs."""
    width = x_MD.shape[-1]
    cut = torch.nn.functional.pad(x_MD.float(), (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = _scale(cut.abs().amax(dim=-1), power_of_two)
    return (cut / scale.unsqueeze(-1)).flatten(-2)[..., :width].to(CODE_DTYPE), scale


def dequantise_tiles(code_MD: Tensor, scale: Tensor) -> Tensor:
    """The float32 inputs that codes and scales stand for."""
    width = code_MD.shape[-1]
    cut = torch.nn.functional.pad(code_MD.float(), (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    return (cut * scale.unsqueeze(-1)).flatten(-2)[..., :width]


def _scale(top: Tensor, power_of_two: bool) -> Tensor:
    scale = torch.where(top > 0, top / TOP, torch.ones_like(top))
    return torch.exp2(torch.ceil(torch.log2(scale))) if power_of_two else scale


def _blocks(weight_FD: Tensor) -> tuple[Tensor, int, int]:
    """`[..., rows/128, 128, cols/128, 128]`, padded with zeros."""
    rows, cols = weight_FD.shape[-2:]
    padded = torch.nn.functional.pad(weight_FD, (0, -cols % BLOCK, 0, -rows % BLOCK))
    return padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)), rows, cols


def _unblocked(cut: Tensor, rows: int, cols: int) -> Tensor:
    return cut.flatten(-2).flatten(-3, -2)[..., :rows, :cols]
