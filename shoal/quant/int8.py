"""Eight-bit integers, one scale per output channel: `weight = scale * code`, codes in -127..127.

Symmetric, so that a product needs no zero points; -128 is left out, so that negation is exact. Inputs of a product are
quantised on the fly, one scale per row and group of columns.
"""

import torch
from torch import Tensor

TOP = 127


def quantise(weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8 like `weight_FD`, and one float32 scale per row; any leading dimensions."""
    weight_FD = weight_FD.float()
    scale_F = weight_FD.abs().amax(dim=-1) / TOP
    code_FD = (weight_FD / _divisor(scale_F).unsqueeze(-1)).round().clamp(-TOP, TOP)
    return code_FD.to(torch.int8), scale_F


def dequantise(code_FD: Tensor, scale_F: Tensor) -> Tensor:
    """The float32 weights that the codes stand for."""
    return code_FD.float() * scale_F.unsqueeze(-1)


def quantise_inputs(x_MD: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes and one scale per row and `group` columns; the width must be a multiple of the group."""
    grouped = x_MD.float().unflatten(-1, (-1, group))
    code, scale = quantise(grouped)
    return code.flatten(-2), scale


def _divisor(scale: Tensor) -> Tensor:
    """Scales to divide by: rows of zeros have scale 0 and any divisor does."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
