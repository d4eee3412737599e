"""Weights on their way into packed form: floats, or the codes of a quantised directory, which stay what they are.

A matrix that is stored in the wanted format is laid out without ever becoming floats; any other is multiplied out and
quantised by round-to-nearest.
"""

from dataclasses import replace

import torch
from torch import Tensor

from shoal.errors import ConfigError
from shoal.kernels.packed import INT8_GROUP, LANES, Codes, panel_scales
from shoal.quant import fp8, int4, int8

INT4_GROUP = 32
Weight = Tensor | Codes
"""A float matrix `[rows, cols]` or stack `[count, rows, cols]`, or codes, which are always a stack."""


def quantised(weight: Weight, format_name: str, group: int | None = None) -> Codes:
    """Codes of a stack in a format; `group` is int4's, default 32, or whatever the codes already have."""
    if isinstance(weight, Codes):
        if weight.format == format_name and (format_name != "int4" or group in (None, weight.group)):
            return weight
        weight = floats(weight)
    weight = _stack(weight)
    if format_name in ("f32", "bf16"):
        return Codes(format_name, 1, weight.float() if format_name == "f32" else weight.to(torch.bfloat16))
    if format_name == "int8":
        code, scale = int8.quantise(weight)
        return Codes("int8", INT8_GROUP, code, scale)
    if format_name == "int4":
        code, scale = int4.quantise(weight, group or INT4_GROUP)
        return Codes("int4", group or INT4_GROUP, int4.to_words(code), scale, word_cols=code.shape[-1])
    if format_name == "fp8":
        code, scale = fp8.quantise_blocks(weight)
        return Codes("fp8", 1, code, panel_scales(scale, weight.shape[-2]))
    raise ConfigError(f"weights={format_name!r} is not a format; use f32, bf16, fp8, int8 or int4.")


def floats(weight: Weight) -> Tensor:
    """What the codes stand for, `[rows, cols]` when there is one matrix; floats as they are."""
    if isinstance(weight, Tensor):
        return weight.detach()
    code, scale = weight.code, weight.scale
    if scale is None:
        meant = code
    elif weight.format == "int8":
        meant = int8.dequantise(code, scale)
    elif weight.format == "int4":
        meant = int4.dequantise(int4.from_words(code, weight.cols), scale, weight.group)
    else:
        rows, cols = code.shape[1:]
        full = scale.repeat_interleave(LANES, dim=1)[:, :rows].repeat_interleave(fp8.BLOCK, dim=2)[..., :cols]
        meant = code.float() * full
    return meant.squeeze(0) if len(meant) == 1 else meant


def joined(first: Weight, second: Weight) -> Weight:
    """The rows of two matrices one after the other."""
    if isinstance(first, Codes) and isinstance(second, Codes) and _same_kind(first, second):
        code, scale = _cat_rows([first, second])
        return replace(first, code=code, scale=scale)
    return torch.cat([floats(first), floats(second)])


def halves(weight: Weight) -> tuple[Weight, Weight]:
    """The upper and the lower half of the rows of every matrix: gate and up projection."""
    rows = weight.code.shape[1] // 2 if isinstance(weight, Codes) else _stack(weight).shape[1] // 2
    if isinstance(weight, Codes) and rows % LANES == 0:
        code, scale = weight.code, weight.scale
        cut = 0 if scale is None else rows * scale.shape[1] // code.shape[1]
        return (
            replace(weight, code=code[:, :rows], scale=None if scale is None else scale[:, :cut]),
            replace(weight, code=code[:, rows:], scale=None if scale is None else scale[:, cut:]),
        )
    upper, lower = _stack(floats(weight)).chunk(2, dim=1)
    return upper, lower


def rows(matrix: Codes, row_M: Tensor) -> Codes:
    """Some rows of an integer matrix, such as the embeddings of tokens."""
    assert matrix.scale is not None and matrix.format != "fp8"
    return replace(matrix, code=matrix.code[:, row_M], scale=matrix.scale[:, row_M])


def _same_kind(first: Codes, second: Codes) -> bool:
    aligned = first.format != "fp8" or first.code.shape[1] % LANES == 0
    same = all(getattr(first, name) == getattr(second, name) for name in ("format", "group", "word_cols"))
    return same and aligned


def _cat_rows(parts: list[Codes]) -> tuple[Tensor, Tensor | None]:
    scales = [part.scale for part in parts if part.scale is not None]
    return torch.cat([part.code for part in parts], dim=1), torch.cat(scales, dim=1) if scales else None


def _stack(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 3 else weight.unsqueeze(0)
