"""Cached latents in FP8: E4M3 codes of the latent in tiles of 128, their float32 scales, the rotary key in bfloat16.

The byte layout is that of FlashMLA's FP8 decoding for DeepSeek-V3.2: 512 codes, 4 scales, 64 rotary numbers make 656 bytes a
token and layer, against 1152 in bfloat16. The rotary key stays as it is: rotation makes its error a phase error.
"""

import torch
from torch import Tensor

from shoal.quant.fp8 import BLOCK, CODE_DTYPE, dequantise_tiles, quantise_tiles


def entry_bytes(latent: int, rotary: int) -> int:
    """Bytes of one token in one layer."""
    return latent + 4 * -(-latent // BLOCK) + 2 * rotary


def pack_entries(entry_W: Tensor, latent: int) -> Tensor:
    """`[..., C + R]` numbers as `[..., bytes]` of uint8."""
    code, scale = quantise_tiles(entry_W[..., :latent])
    rotary = entry_W[..., latent:].to(torch.bfloat16).contiguous()
    return torch.cat([code.view(torch.uint8), scale.contiguous().view(torch.uint8), rotary.view(torch.uint8)], dim=-1)


def entries_are_finite(packed: Tensor, latent: int) -> bool:
    """Whether packed entries stand for numbers: no code of NaN, every scale and rotary number finite."""
    num_scales = 4 * -(-latent // BLOCK)
    code, scale, rotary = packed.split([latent, num_scales, packed.shape[-1] - latent - num_scales], dim=-1)
    scale, rotary = scale.contiguous().view(torch.float32), rotary.contiguous().view(torch.bfloat16)
    return bool((code & 0x7F != 0x7F).all() and scale.isfinite().all() and rotary.isfinite().all())


def unpack_entries(packed: Tensor, latent: int) -> Tensor:
    """The float32 numbers that packed entries stand for."""
    num_scales = 4 * -(-latent // BLOCK)
    code, scale, rotary = packed.split([latent, num_scales, packed.shape[-1] - latent - num_scales], dim=-1)
    meant = dequantise_tiles(code.view(CODE_DTYPE), scale.contiguous().view(torch.float32))
    return torch.cat([meant, rotary.contiguous().view(torch.bfloat16).float()], dim=-1)
