"""FP8 products on a GPU, by name of their backend; None where the reference has to do the work.

Not yet measured: no GPU was at hand when this was written. The Triton kernels are tested against float64 in Triton's
interpreter; PyTorch's scaled product only where there is a Hopper GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shoal.errors import ConfigError

Product = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""Codes `[M, K]`, scales of 1 x 128 tiles, codes `[N, K]`, their scales, and the rows that share one (1 or 128)."""
GroupedProduct = Callable[[Tensor, Tensor, Tensor, Tensor, list[tuple[int, int]]], Tensor]
HOPPER = (9, 0)
FIRST_WITH_FP8 = (8, 9)
ROW_GRAIN = 16
"""cuBLASLt wants leading dimensions of whole 16 bytes."""


def product_by(backend: str, device: torch.device) -> Product | None:
    """The kernel for one product.

    Raises:
        ConfigError: the backend cannot run on this device.
    """
    if backend == "reference" or (backend == "auto" and not _has_fp8(device)):
        return None
    if backend == "torch":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
            raise ConfigError(f"the fp8 backend 'torch' needs a Hopper GPU; on {device} use 'auto' or 'reference'.")
        return torch_product
    from shoal.kernels.triton.block_fp8 import scaled_matmul

    return scaled_matmul


def grouped_product_by(backend: str, device: torch.device) -> GroupedProduct | None:
    """The kernel for a block of rows per expert; None where a loop over single products does it."""
    if backend not in ("auto", "triton") or (backend == "auto" and not _has_fp8(device)):
        return None
    from shoal.kernels.triton.block_fp8 import grouped_scaled_matmul

    return grouped_scaled_matmul


def torch_product(code_MK: Tensor, scale: Tensor, right_NK: Tensor, right_scale: Tensor, block_rows: int) -> Tensor:
    """`torch.nn.functional.scaled_mm` with 1 x 128 against 1 x 128 or 128 x 128 scales; float32 accumulation promoted by cuBLASLt."""
    from torch.nn.functional import ScalingType, scaled_mm

    kind = ScalingType.BlockWise128x128 if block_rows > 1 else ScalingType.BlockWise1x128
    width = -code_MK.shape[1] % ROW_GRAIN
    code_MK = torch.nn.functional.pad(code_MK.view(torch.uint8), (0, width)).view(code_MK.dtype)
    right_NK = torch.nn.functional.pad(right_NK.contiguous().view(torch.uint8), (0, width)).view(right_NK.dtype)
    product: Tensor = scaled_mm(
        code_MK.contiguous(),
        right_NK.t(),
        scale_a=_outer_first(scale),
        scale_recipe_a=ScalingType.BlockWise1x128,
        scale_b=_padded_columns(right_scale) if block_rows > 1 else _outer_first(right_scale),
        scale_recipe_b=kind,
        output_dtype=torch.bfloat16,
    )
    return product.float()


def _outer_first(scale: Tensor) -> Tensor:
    """Scales of tiles lie column by column for cuBLASLt."""
    return scale.t().contiguous().t()


def _padded_columns(scale: Tensor) -> Tensor:
    """Scales of blocks need a leading dimension of whole fours, or the product is silently wrong (pytorch pull request 166752)."""
    cols = scale.shape[1]
    padded = torch.nn.functional.pad(scale, (0, -cols % 4))
    return padded[:, :cols]


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_WITH_FP8
