"""Weights in the layout of the few-row kernels: panels of 16 rows, columns outermost inside, four of them interleaved line by
line (see `cpu/packed.h`).

`pack` takes quantised weights `[count, rows, cols]` and lays them out; `linear` is the product alone.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.errors import ConfigError
from shoal.kernels.cpu.build import library
from shoal.kernels.cpu.calling import call

LANES = 16
BUNDLE = 4
"""Panels that are interleaved."""
FP8_BLOCK = 128
FORMATS = {"f32": 0, "bf16": 1, "int8": 2, "int4": 3, "fp8": 4}
"""Names as on the command line; numbers as in `cpu/packed.h`."""
ABSENT = -1
INT8_GROUP = 64
"""Columns of an input that share a scale when weights are int8."""
_ZERO_CODES = 0x88888888 - (1 << 32)
"""Eight int4 codes of zero, as a signed word."""
_SIGNS = 0x80808080 - (1 << 32)
"""The signs of four bytes."""


class MatrixStruct(ctypes.Structure):
    """`shoal::Matrix`."""

    _fields_ = [
        ("format", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Packed:
    """`count` matrices `[rows, cols]` as panels; `data` `[count, panels, bytes of one]`, `scale` likewise or empty."""

    format: str
    group: int
    rows: int
    cols: int
    data: Tensor
    scale: Tensor

    @property
    def num_bytes(self) -> int:
        return self.data.numel() + self.scale.numel() * self.scale.element_size()

    def struct(self) -> MatrixStruct:
        """The C view; valid while this object lives."""
        return MatrixStruct(
            FORMATS[self.format],
            self.group,
            self.rows,
            self.cols,
            len(self.data),
            self.data.data_ptr(),
            self.scale.data_ptr() if self.scale.numel() else None,
        )


def absent() -> MatrixStruct:
    """What stands for a matrix that a layer lacks."""
    return MatrixStruct(ABSENT, 1, 0, 0, 0, None, None)


@dataclass(frozen=True)
class Codes:
    """Quantised weights before they are laid out: `code` `[count, rows, cols]` and `scale` as the format has them."""

    format: str
    group: int
    code: Tensor
    """f32, bf16: the weights; int8: int8 codes; int4: int32 words of eight codes (`quant/int4.py`); fp8: float8_e4m3fn."""
    scale: Tensor | None = None
    """int8: float32 `[count, rows]`; int4: bfloat16 `[count, rows, groups]`; fp8: float32 `[count, rows/16, cols/128]`, the
    scale of a block repeated for each of its panels (`panel_scales`)."""
    word_cols: int | None = None
    """int4: columns of each matrix, since the last word may not be full."""

    @property
    def cols(self) -> int:
        """Columns of each matrix."""
        return self.word_cols or self.code.shape[-1]


def panel_scales(block_scale: Tensor, rows: int) -> Tensor:
    """FP8 scales of 128 x 128 blocks `[count, rows/128, cols/128]`, one line per panel of 16 rows."""
    panel = torch.arange(-(-rows // LANES))
    return block_scale.float()[:, panel * LANES // FP8_BLOCK]


Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Gives memory for a tensor: of a special kind, perhaps."""


def _ordinary(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def pack(codes: Codes, empty: Empty = _ordinary) -> Packed:
    """Lay out one stack of matrices, in memory from `empty`."""
    data, scale = _lay_out(codes, empty), _lay_out_scale(codes, empty)
    return Packed(codes.format, codes.group, codes.code.shape[1], codes.cols, data, scale)


def pack_gated(gate: Codes, up: Codes, empty: Empty = _ordinary) -> Packed:
    """Gate and up projection of the same shape with alternating panels, so that one task makes 16 activations."""
    code = _alternating(gate.code, up.code, LANES, _ZERO_CODES if gate.format == "int4" else 0)
    scale = None
    if gate.scale is not None and up.scale is not None:
        scale = _alternating(gate.scale, up.scale, 1 if gate.format == "fp8" else LANES)
    return pack(Codes(gate.format, gate.group, code, scale, gate.word_cols), empty)


def _alternating(first: Tensor, second: Tensor, rows: int, filler: int = 0) -> Tensor:
    """`rows` rows of one, as many of the other, and so on, the last ones filled up: `[count, F, ...]` to `[count, 2F, ...]`."""
    halves = [_padded(half, rows, filler).unflatten(1, (-1, rows)) for half in (first, second)]
    return torch.stack(halves, dim=2).flatten(1, 3)


def _padded(stack: Tensor, rows: int, filler: int = 0) -> Tensor:
    """`[count, F, ...]` with F filled up to a multiple of `rows`."""
    missing = -stack.shape[1] % rows
    if not missing:
        return stack
    tail = torch.full(
        (len(stack), missing, *stack.shape[2:]), filler, dtype=torch.uint8 if stack.itemsize == 1 else stack.dtype
    )
    return torch.cat([stack, tail.view(stack.dtype)], dim=1)


RANDOM_BYTES = 1 << 24
"""Random codes repeat after this many bytes: more than a processor keeps."""


def random_packed(format_name: str, group: int, shape: Sequence[int], empty: Empty) -> Packed:
    """A stack of matrices `[count, rows, cols]` whose codes are random bits and whose weights have a deviation near 0.02.

    For measuring speed at sizes where quantising real weights would take longer than the measurement. Panels come from
    `empty`, so that they may lie in memory of a special kind.
    """
    count, rows, cols = shape
    panels, width = -(-rows // LANES), padded_columns(format_name, group, cols)
    bits = {"f32": 32, "bf16": 16, "fp8": 8, "int8": 8, "int4": 4}[format_name]
    data = empty((count, panels, width * LANES * bits // 8), torch.uint8)
    pattern = torch.randint(-(2**62), 2**62, (RANDOM_BYTES // 8,), generator=torch.Generator().manual_seed(0))
    pattern = _plausible(format_name, pattern.view(torch.uint8))
    for part in data.view(-1).split(RANDOM_BYTES):
        part.copy_(pattern[: len(part)])
    if format_name == "int8":
        scale = empty((count, panels, LANES), torch.float32).fill_(0.02 / 74)
    elif format_name == "int4":
        scale = empty((count, panels, width // group * LANES), torch.bfloat16).fill_(0.02 / 4.6)
    elif format_name == "fp8":
        scale = empty((count, panels, -(-cols // FP8_BLOCK)), torch.float32).fill_(0.02 / 0.6)
    else:
        scale = torch.empty(0)
    return Packed(format_name, group, rows, cols, data, scale)


def _plausible(format_name: str, pattern: Tensor) -> Tensor:
    """Random bytes with exponents of ordinary weights, where a format has exponents."""
    if format_name == "fp8":
        return pattern & 0x9F | 0x20
    if format_name == "bf16":
        return (pattern.view(torch.int16) & ~0x7F00 | 0x3C00).view(torch.uint8)
    if format_name == "f32":
        return (pattern.view(torch.int32) & ~0x7F000000 | 0x3C000000).view(torch.uint8)
    return pattern


def linear(packed: Packed, x_MD: Tensor) -> Tensor:
    """`x @ weight.T` in float32 for a single packed matrix.

    Raises:
        ConfigError: the kernels could not be built here.
    """
    kernels = library()
    if kernels is None:
        raise ConfigError("the CPU kernels are not available; install g++ (or unset SHOAL_KERNELS) and try again.")
    x_MD = x_MD.float().contiguous()
    assert x_MD.shape[1] == packed.cols, (x_MD.shape, packed.cols)
    y_MF = torch.empty(len(x_MD), packed.rows)
    struct = packed.struct()
    kernels.packed_linear(
        ctypes.byref(struct),
        ctypes.c_void_p(x_MD.data_ptr()),
        ctypes.c_int64(len(x_MD)),
        ctypes.c_void_p(y_MF.data_ptr()),
    )
    return y_MF


def padded_columns(format_name: str, group: int, cols: int) -> int:
    """Columns after padding, as `Matrix::padded_cols`."""
    grain = {"f32": 1, "bf16": 2, "fp8": 4}.get(format_name, group)
    return -(-cols // grain) * grain


def _lay_out(codes: Codes, empty: Empty) -> Tensor:
    """Panels of bytes `[count, panels, bytes of one]`, interleaved."""
    width = padded_columns(codes.format, codes.group, codes.cols)
    if codes.format == "fp8":
        code = codes.code.view(torch.uint8)
        code = torch.nn.functional.pad(code, (0, width - codes.cols, 0, -code.shape[1] % LANES))
        halves = code.unflatten(1, (-1, LANES)).unflatten(-1, (-1, 2, 2))
        return _interleaved(halves.permute(0, 1, 3, 4, 2, 5), empty)
    if codes.format == "int4":
        return _words(codes.code, width // 8, empty, filler=_ZERO_CODES, nibbles=True)
    code = codes.code.to({"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[codes.format])
    per_word = 4 // code.itemsize
    if codes.cols % per_word:
        code = torch.nn.functional.pad(code, (0, -codes.cols % per_word))
    flip = _SIGNS if codes.format == "int8" else 0
    return _words(code.contiguous().view(torch.int32), width // per_word, empty, flip=flip)


def _words(word: Tensor, lines: int, empty: Empty, *, filler: int = 0, flip: int = 0, nibbles: bool = False) -> Tensor:
    """Words of 32 bits `[count, rows, words of a row]` as panels of `lines` words a row.

    int4 words hold eight codes side by side, and become words whose bytes hold codes four columns apart. Nothing is ever
    spread out to bytes, which would be most of a large model's loading time.
    """
    if library() is None:
        return words_by_torch(word, lines, empty, filler=filler, flip=flip, nibbles=nibbles)
    word = word.contiguous()
    count, rows, width = word.shape
    laid = empty((count, -(-rows // LANES), lines * LANES), torch.int32)
    options = map(ctypes.c_int32, (filler, flip, nibbles))
    call("lay_out_words", word, count, rows, width, lines, *options, laid)
    return laid.view(torch.uint8)


def words_by_torch(
    word: Tensor, lines: int, empty: Empty = _ordinary, *, filler: int = 0, flip: int = 0, nibbles: bool = False
) -> Tensor:
    """The definition of `lay_out.cpp`. int4: a perfect shuffle of the nibbles of every word, in two exchanges: of its middle
    bytes, then of the middle nibbles of its halves."""
    missing = (0, lines - word.shape[-1], 0, -word.shape[1] % LANES)
    word = torch.nn.functional.pad(word, missing, value=filler)
    laid = _interleaved(word.unflatten(1, (-1, LANES)).transpose(2, 3), empty)
    for shift, moved in ((8, 0x0000FF00), (4, 0x00F000F0)) if nibbles else ():
        exchanged = (laid ^ (laid >> shift)).bitwise_and_(moved)
        laid.bitwise_xor_(exchanged).bitwise_xor_(exchanged.bitwise_left_shift_(shift))
    return laid.bitwise_xor_(torch.tensor(flip, dtype=torch.int32)).view(torch.uint8)


def _interleaved(panel: Tensor, empty: Empty) -> Tensor:
    """Panels `[count, P, lines, ...]` in memory as bundles of four, line by line; the last bundle holds what is left.

    Returns:
        `[count, P, numbers of one panel]`, whose last two dimensions are only the amount: panels do not lie apart.
    """
    count, panels, lines = panel.shape[:3]
    bundled = panels // BUNDLE * BUNDLE
    laid = empty((count, panels * lines, *panel.shape[3:]), panel.dtype)
    for first, last in ((0, bundled), (bundled, panels)):
        if first < last:
            width = min(BUNDLE, last - first)
            place = laid[:, first * lines : last * lines].unflatten(1, (-1, lines, width))
            place.copy_(panel[:, first:last].unflatten(1, (-1, width)).transpose(2, 3))
    return laid.view(count, panels, -1)


def _lay_out_scale(codes: Codes, empty: Empty) -> Tensor:
    """Scales `[count, panels, ...]` in the order in which a kernel reads them; empty for unscaled formats."""
    if codes.scale is None:
        return torch.empty(0)
    panels = -(-codes.code.shape[1] // LANES)
    if codes.format == "fp8":
        if codes.scale.shape[1] != panels:
            raise ConfigError(
                f"fp8 weights need a multiple of {LANES} rows in every part; this matrix has {codes.code.shape[1]}."
            )
        return _interleaved(codes.scale.float(), empty)
    scale = _padded(codes.scale, LANES).unflatten(1, (-1, LANES))
    if codes.format == "int8":
        return _interleaved(scale.float().unsqueeze(2), empty)
    return _interleaved(scale.transpose(2, 3), empty)
