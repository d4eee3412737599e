"""Rotary position embedding, plain and YaRN-extended, in the two layouts that checkpoints use.

DeepSeek rotates *interleaved* pairs (x0, x1), (x2, x3), ...; the Llama family rotates *halves* (x0, x[R/2]), .... The
frequency tables are the same. YaRN (V2 §3.1.4) slows the low frequencies by `factor`, keeps the high ones, and blends
linearly between. Here YaRN acts whenever `rope_scaling` is set: a model that was pretrained before context extension
leaves it out.
"""

import math

import torch
from torch import Tensor

from shoal.config import ModelConfig, YarnConfig


def rotation_frequencies(rotary_dim: int, theta: float, yarn: YarnConfig | None) -> Tensor:
    """Angle per position of each rotary pair, float32 `[rotary_dim / 2]`."""
    pair = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    frequency = theta**-pair
    if yarn is None:
        return frequency.float()
    low = math.floor(_pair_with_rotations(yarn.beta_fast, rotary_dim, theta, yarn))
    high = math.ceil(_pair_with_rotations(yarn.beta_slow, rotary_dim, theta, yarn))
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return (frequency * (1 - ramp) + frequency / yarn.factor * ramp).float()


def _pair_with_rotations(rotations: float, rotary_dim: int, theta: float, yarn: YarnConfig) -> float:
    """The (fractional) pair that turns `rotations` times over the original context."""
    return (
        rotary_dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))
    )


def rotation_table(config: ModelConfig, rotary_dim: int) -> Tensor:
    """Unit complex rotations `[max_position_embeddings, rotary_dim / 2]`, complex64."""
    frequency = rotation_frequencies(rotary_dim, config.rope_theta, config.rope_scaling)
    angle = torch.outer(torch.arange(config.max_position_embeddings).double(), frequency.double())
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64) * _magnitude(config.rope_scaling)


def _magnitude(yarn: YarnConfig | None) -> float:
    """YaRN's scale on cosine and sine: mscale over mscale_all_dim, 1 for every released DeepSeek model."""
    if yarn is None or yarn.factor <= 1:
        return 1.0
    grow = 0.1 * math.log(yarn.factor)
    if yarn.mscale and yarn.mscale_all_dim:
        return (grow * yarn.mscale + 1.0) / (grow * yarn.mscale_all_dim + 1.0)
    return grow + 1.0


def rotate_interleaved(x_BSHR: Tensor, rotation_BSP: Tensor) -> Tensor:
    """Rotate pairs (x0, x1), (x2, x3), ... (DeepSeek). `rotation_BSP` is complex, P = R / 2 pairs."""
    wide_BSHR = x_BSHR.to(torch.promote_types(x_BSHR.dtype, torch.float32))
    if any(stride % 2 for stride in wide_BSHR.stride()[:-1]) or wide_BSHR.storage_offset() % 2:
        wide_BSHR = wide_BSHR.contiguous()  # complex numbers need even strides; odd plain widths N break them
    pairs = torch.view_as_complex(wide_BSHR.unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * _for_heads(rotation_BSP, pairs))
    return rotated.flatten(-2).to(x_BSHR.dtype)


def rotate_halves(x_BSHR: Tensor, rotation_BSP: Tensor) -> Tensor:
    """Rotate pairs (x0, x[R/2]), (x1, x[R/2 + 1]), ... (Llama, GLM)."""
    first, second = x_BSHR.to(torch.promote_types(x_BSHR.dtype, torch.float32)).chunk(2, dim=-1)
    rotation = _for_heads(rotation_BSP, first)
    cos, sin = rotation.real, rotation.imag
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSHR.dtype)


def _for_heads(rotation_BSP: Tensor, x_BSHP: Tensor) -> Tensor:
    rotation = rotation_BSP.unsqueeze(-2)
    return rotation.to(torch.complex128) if x_BSHP.dtype in (torch.float64, torch.complex128) else rotation
