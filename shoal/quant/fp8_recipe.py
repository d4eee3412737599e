"""What is FP8 in training and how (DeepSeek-V3 §3.3): E4M3 everywhere, tiles for inputs and gradients, blocks for weights.

The published recipe has a few exceptions from plain float32 scales. Where a tensor is tiled anew along its other axis, or
is sent between machines, its scales are powers of two, so that nothing is rounded twice: the inputs of the projection
after attention (kept in E5M6 for the weight gradient), what is dispatched to experts, and the gradients that come back.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.errors import ConfigError

Backend = Literal["auto", "reference", "torch", "triton"]
BACKENDS = ("auto", "reference", "torch", "triton")


@dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """Switches of FP8 training; the defaults are the published ones."""

    wgrad: Literal["fp8", "bf16"] = "fp8"
    """Precision of the weight gradients' products."""
    power_of_two: Literal["published", "everywhere", "nowhere"] = "published"
    """Which scales are powers of two; "everywhere" is DeepSeek-V3.1."""
    backend: Backend = "auto"
    """Who multiplies: "reference" quantises, multiplies out and takes a float32 product (emulation, any device); "torch" and
    "triton" multiply codes on Hopper. "auto" is triton on a GPU that has FP8 units, else the reference."""

    def __post_init__(self) -> None:
        if self.wgrad not in ("fp8", "bf16"):
            raise ConfigError(f"wgrad={self.wgrad!r} is unknown; use 'fp8' or 'bf16'.")
        if self.power_of_two not in ("published", "everywhere", "nowhere"):
            raise ConfigError(
                f"power_of_two={self.power_of_two!r} is unknown; use 'published', 'everywhere' or 'nowhere'."
            )
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend={self.backend!r} is unknown; use one of {', '.join(BACKENDS)}.")

    def exact_scale(self, is_published: bool) -> bool:
        """Whether the scales of a tensor are powers of two; `is_published` where the paper names it."""
        return self.power_of_two == "everywhere" or (self.power_of_two == "published" and is_published)


def round_mantissa(x: Tensor, mantissa_bits: int, exponent_bits: int, scale: Tensor) -> Tensor:
    """The nearest numbers of a small float format whose largest is met by `scale` (E5M6: 6 and 5 bits); emulation.

    Args:
        scale: broadcast against `x`; numbers are divided by it before rounding and multiplied after.
    """
    unit = x.double() / scale
    top = 2 ** (exponent_bits - 1)
    exponent = torch.floor(torch.log2(unit.abs().clamp_min(2.0 ** (2 - top)))).clamp(max=top - 1)
    step = torch.exp2(exponent - mantissa_bits)
    return ((unit / step).round() * step * scale).to(x.dtype)
