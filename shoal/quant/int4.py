"""Four-bit integers, one scale per group of columns: `weight = scale * code`, codes in -8..7.

Round-to-nearest uses the sign of the largest weight, so that it lands on -8 and the grid's extra code is not wasted; of that
and the plain symmetric grid the better one is kept, group by group. `calibrated` (in `calibration.py`) chooses codes by
the error they make on real inputs instead. Scales are bfloat16, and codes are chosen against the rounded scale.
"""

import torch
from torch import Tensor

LOW, HIGH = -8, 7
GROUPS = (32, 64, 128)
CACHED_NUMBERS = 1 << 16
"""Weights quantised together: a quarter of a megabyte and its temporaries fit into a core's cache."""


def quantise(weight_FD: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes, int8 like `weight_FD`, and bfloat16 scales `[F, D / group]`; a last short group is padded with zeros."""
    cols = weight_FD.shape[-1]
    code_FD = torch.empty(weight_FD.shape, dtype=torch.int8)
    scale_FG = torch.empty(*weight_FD.shape[:-1], -(-cols // group), dtype=torch.bfloat16)
    # A few rows at a time: the dozens of passes over them then stay in the processor's cache.
    rows = max(1, CACHED_NUMBERS // max(cols, 1))
    parts = (tensor.flatten(0, -2).split(rows) for tensor in (weight_FD, code_FD, scale_FG))
    for weight, code, scale in zip(*parts):
        grouped_FGX = _grouped(weight.float(), group)
        scale.copy_(best_scale(grouped_FGX))
        code.copy_(round_to_codes(grouped_FGX, scale).flatten(-2)[:, :cols])
    return code_FD, scale_FG


def best_scale(grouped_FGX: Tensor) -> Tensor:
    """Of a few candidate scales the one with the least squared error, per group, bfloat16."""
    largest_FG1 = grouped_FGX.gather(-1, grouped_FGX.abs().argmax(dim=-1, keepdim=True))
    best, least = None, None
    for steps in (LOW, -7.5, -7.0, -6.5, HIGH):
        scale_FG = (largest_FG1 / steps).squeeze(-1).to(torch.bfloat16)
        error_FG = (
            (round_to_codes(grouped_FGX, scale_FG) * scale_FG.float().unsqueeze(-1) - grouped_FGX).square().sum(-1)
        )
        if best is None or least is None:
            best, least = scale_FG, error_FG
        else:
            best, least = torch.where(error_FG < least, scale_FG, best), torch.minimum(error_FG, least)
    assert best is not None
    return best


def round_to_codes(grouped_FGX: Tensor, scale_FG: Tensor) -> Tensor:
    """Nearest codes as floats; groups of zeros have scale 0 and code 0."""
    scale = scale_FG.float().unsqueeze(-1)
    code = (grouped_FGX / torch.where(scale == 0, torch.ones_like(scale), scale)).round().clamp(LOW, HIGH)
    return torch.where(scale == 0, torch.zeros_like(code), code)


def dequantise(code_FD: Tensor, scale_FG: Tensor, group: int) -> Tensor:
    """The float32 weights that codes and scales stand for."""
    grouped = _grouped(code_FD.float(), group) * scale_FG.float().unsqueeze(-1)
    return grouped.flatten(-2)[..., : code_FD.shape[-1]]


def to_words(code_FD: Tensor) -> Tensor:
    """Eight codes to a 32-bit word, the first in the lowest four bits, each shifted by 8 to be positive.

    The layout of compressed-tensors ("pack-quantized"). A last short word is filled with zero bits.
    """
    padded = torch.nn.functional.pad(code_FD - LOW, (0, -code_FD.shape[-1] % 8))
    nibble = padded.view(torch.uint8).unflatten(-1, (-1, 4, 2))
    return (nibble[..., 0] | nibble[..., 1] << 4).contiguous().flatten(-2).view(torch.int32)


def from_words(word_FX: Tensor, cols: int) -> Tensor:
    """Codes, int8, of packed words; undoes `to_words`."""
    byte = word_FX.contiguous().view(torch.uint8)
    nibble = torch.stack([byte & 0x0F, byte >> 4], dim=-1).flatten(-2)
    return (nibble.view(torch.int8) + LOW)[..., :cols]


def _grouped(weight_FD: Tensor, group: int) -> Tensor:
    missing = -weight_FD.shape[-1] % group
    return torch.nn.functional.pad(weight_FD, (0, missing)).unflatten(-1, (-1, group))
