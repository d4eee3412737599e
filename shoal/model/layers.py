"""The plain parts: linear maps, RMSNorm, and how precision is chosen.

Parameters and the residual stream stay in float32; only matrix products run in `compute_dtype` (bfloat16 where the
processor multiplies it faster, see `device.fast_dtype`). That is the CPU form of the published mixed-precision recipe
(DeepSeek-V3 §3.3: low precision in the products, high precision in norms, gates and attention core). `Linear` asks for
its dtype in one place, which is also where FP8 training enters (`fp8_products.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from shoal.device import fast_dtype
from shoal.kernels import products
from shoal.kernels.dispatch import rms_norm
from shoal.model.fp8_products import Fp8LinearProduct
from shoal.quant.fp8_recipe import Fp8Recipe


class LinearProduct(torch.autograd.Function):
    """`x @ weight.T` with the product in a lower dtype and everything around it in the dtype of `x`.

    Autocast would do the same through separate cast nodes; one node keeps the low-precision input (half the saved
    bytes) and casts the weight once per direction.
    """

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_FD: Tensor, dtype: torch.dtype) -> Tensor:
        low_x_MD, low_weight_FD = x_MD.to(dtype), weight_FD.to(dtype)
        ctx.save_for_backward(low_x_MD, low_weight_FD)
        ctx.high_dtypes = (x_MD.dtype, weight_FD.dtype)
        return torch.mm(low_x_MD, low_weight_FD.t()).to(x_MD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        low_x_MD, low_weight_FD = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.high_dtypes
        grad_MF = grads[0].to(low_x_MD.dtype)
        grad_x = torch.mm(grad_MF, low_weight_FD).to(x_dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.mm(grad_MF.t(), low_x_MD).to(weight_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def linear_product(x: Tensor, weight_FD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`x @ weight.T` over the last dimension, the product taken in `dtype` (None: the dtype of `x`)."""
    if dtype is None or (dtype == x.dtype and dtype == weight_FD.dtype):
        return torch.nn.functional.linear(x, weight_FD.to(x.dtype))
    flat_MD = x.reshape(-1, x.shape[-1])
    product = products.linear(flat_MD, weight_FD) if dtype == torch.bfloat16 else None
    if product is None:
        product = LinearProduct.apply(flat_MD, weight_FD, dtype)
    return product.view(*x.shape[:-1], weight_FD.shape[0])


class Linear(nn.Module):
    """A bias-free linear map whose product runs in `compute_dtype`, or in FP8; `weight` is `[out, in]` as published."""

    def __init__(self, in_features: int, out_features: int, *, after_attention: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.compute_dtype: torch.dtype | None = None
        self.fp8: Fp8Recipe | None = None
        self.after_attention = after_attention
        """Inputs come from the attention core; the FP8 recipe keeps those more finely."""

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 is not None:
            flat_MD = x.reshape(-1, x.shape[-1])
            product: Tensor = Fp8LinearProduct.apply(flat_MD, self.weight, self.fp8, self.after_attention)
            return product.view(*x.shape[:-1], len(self.weight))
        return linear_product(x, self.weight, self.compute_dtype)


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, times a learnt gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products that a config's `precision` means; None leaves float32.

    With "fp8" it is the dtype of what stays in high precision (head, prediction join), chosen as by "auto".
    """
    if precision in ("auto", "fp8"):
        fast = fast_dtype(device)
        return None if fast == torch.float32 else fast
    return torch.bfloat16 if precision == "bf16" else None


def set_compute_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Let every matrix product of `model` run in `dtype`; None means the dtype of its input."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype  # type: ignore[assignment]


def set_fp8(model: nn.Module, recipe: Fp8Recipe | None) -> None:
    """Take the products of every linear and expert layer inside decoder layers in FP8; None turns it off.

    Embedding, head, router and the join of multi-token prediction stay as they are (DeepSeek-V3 §3.3.1).
    """
    for name, module in model.named_modules():
        inside = name.startswith("layers.") or (name.startswith("mtp.") and ".block." in name)
        if hasattr(module, "fp8") and inside:
            module.fp8 = recipe


def product_dtype(model: nn.Module) -> torch.dtype | None:
    """What `set_compute_dtype` was last told."""
    return next((module.compute_dtype for module in model.modules() if isinstance(module, Linear)), None)
