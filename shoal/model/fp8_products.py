"""Linear maps and SwiGLU whose three matrix products are FP8 (DeepSeek-V3 §3.3, figure 6).

Forward, input gradient and weight gradient are all `left @ right.T` of codes with scales, so one function
(`scaled_product`) is the seam behind which the reference, PyTorch's scaled product and the Triton kernels stand. What
backward needs of the forward pass is kept as codes: a byte a number.

Differs from the paper: E5M6 inputs of the projection after attention are rounded to that format but kept in bfloat16,
which holds them exactly; there is no 12-bit type to store them in.
"""

from typing import Any

import torch
from torch import Tensor

from shoal.kernels.dispatch import swiglu_backward, swiglu_forward
from shoal.kernels.fp8 import grouped_product_by, product_by
from shoal.quant import fp8
from shoal.quant.fp8 import Scaled, blocks, tiles
from shoal.quant.fp8_recipe import Fp8Recipe, round_mantissa

Groups = list[tuple[int, int]]


def scaled_product(left: Scaled, right: Scaled, recipe: Fp8Recipe) -> Tensor:
    """`left @ right.T`, float32, by the backend of the recipe."""
    kernel = product_by(recipe.backend, left.code.device)
    if kernel is None:
        return fp8.product(left, right)
    return kernel(left.code, left.scale, right.code, right.scale, right.block_rows)


def weight_gradient(grad_MF: Tensor, x_MD: Tensor, recipe: Fp8Recipe) -> Tensor:
    """`grad.T @ x`, both tiled along the tokens, or in bfloat16."""
    if recipe.wgrad == "bf16":
        return torch.mm(grad_MF.bfloat16().t(), x_MD.bfloat16()).float()
    exact = recipe.exact_scale(is_published=False)
    return scaled_product(tiles(grad_MF.t(), exact), tiles(x_MD.t(), exact), recipe)


class Fp8LinearProduct(torch.autograd.Function):
    """`x @ weight.T`; `after_attention` marks the projection whose inputs are kept in E5M6."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_FD: Tensor, recipe: Fp8Recipe, after_attention: bool) -> Tensor:
        x = tiles(x_MD, recipe.exact_scale(after_attention))
        kept = _e5m6(x_MD, x.scale) if after_attention else x.code
        ctx.save_for_backward(kept, x.scale, weight_FD)
        ctx.recipe, ctx.dtype = recipe, x_MD.dtype
        weight = blocks(weight_FD, recipe.exact_scale(is_published=False))
        return scaled_product(x, weight, recipe).to(x_MD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        kept, scale, weight_FD = ctx.saved_tensors
        recipe, grad_MF = ctx.recipe, grads[0].contiguous()
        exact = recipe.exact_scale(is_published=False)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            turned = blocks(weight_FD, exact).turned()
            grad_x = scaled_product(tiles(grad_MF, exact), turned, recipe).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            x_MD = kept.float() if kept.dtype == torch.bfloat16 else Scaled(kept, scale, 1).floats()
            grad_weight = weight_gradient(grad_MF, x_MD, recipe).to(weight_FD.dtype)
        return grad_x, grad_weight, None, None


class Fp8GroupedSwiGLU(torch.autograd.Function):
    """SwiGLU of each block of rows with its own weights; keeps codes of its inputs and of the gate-up product."""

    @staticmethod
    def forward(
        ctx: Any, x_PD: Tensor, gate_up_EXD: Tensor, down_EDF: Tensor, groups: Groups, recipe: Fp8Recipe
    ) -> Tensor:
        x = tiles(x_PD, recipe.exact_scale(is_published=True))
        gate_up_PX = _grouped(x, _gate_up_blocks(gate_up_EXD, recipe), groups, recipe)
        cached = tiles(gate_up_PX, recipe.exact_scale(is_published=False))
        act = tiles(swiglu_forward(gate_up_PX), recipe.exact_scale(is_published=False))
        down = blocks(down_EDF, recipe.exact_scale(is_published=False))
        ctx.save_for_backward(x.code, x.scale, cached.code, cached.scale, gate_up_EXD, down_EDF)
        ctx.groups, ctx.recipe, ctx.dtype = groups, recipe, x_PD.dtype
        return _grouped(act, down, groups, recipe).to(x_PD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x_code, x_scale, code, scale, gate_up_EXD, down_EDF = ctx.saved_tensors
        recipe, groups = ctx.recipe, ctx.groups
        exact = recipe.exact_scale(is_published=False)
        grad_PD = grads[0].float().contiguous()
        grad = tiles(grad_PD, recipe.exact_scale(is_published=True))
        grad_act_PF = _grouped(grad, blocks(down_EDF, exact).turned(), groups, recipe)
        grad_gate_up_PX, act_PF = swiglu_backward(grad_act_PF, Scaled(code, scale, 1).floats())
        turned = _gate_up_blocks(gate_up_EXD, recipe).turned()
        grad_x_PD = _grouped(tiles(grad_gate_up_PX, exact), turned, groups, recipe)
        x_PD = Scaled(x_code, x_scale, 1).floats()
        grad_gate_up, grad_down = torch.zeros_like(gate_up_EXD), torch.zeros_like(down_EDF)
        for expert, (start, stop) in enumerate(groups):
            if stop > start:
                rows = slice(start, stop)
                grad_gate_up[expert] = weight_gradient(grad_gate_up_PX[rows], x_PD[rows], recipe)
                grad_down[expert] = weight_gradient(grad_PD[rows], act_PF[rows], recipe)
        return grad_x_PD.to(ctx.dtype), grad_gate_up, grad_down, None, None


def _grouped(left: Scaled, right: Scaled, groups: Groups, recipe: Fp8Recipe) -> Tensor:
    """Each block of rows times its own matrix of the stack."""
    kernel = grouped_product_by(recipe.backend, left.code.device)
    if kernel is not None:
        return kernel(left.code, left.scale, right.code, right.scale, groups)
    out = torch.zeros(len(left.code), right.code.shape[1], device=left.code.device)
    for expert, (start, stop) in enumerate(groups):
        if stop > start:
            out[start:stop] = scaled_product(left[start:stop], right[expert], recipe)
    return out


def _gate_up_blocks(gate_up_EXD: Tensor, recipe: Fp8Recipe) -> Scaled:
    """Codes of the fused stack: those of the two published matrices where their width is a multiple of 128."""
    exact = recipe.exact_scale(is_published=False)
    return blocks(gate_up_EXD, exact)


def _e5m6(x_MD: Tensor, scale: Tensor) -> Tensor:
    """Inputs in 6 bits of mantissa against the scale of their tile, held in bfloat16."""
    wide = scale.repeat_interleave(fp8.BLOCK, dim=-1)[..., : x_MD.shape[-1]]
    return round_mantissa(x_MD.float(), 6, 5, wide).bfloat16()
