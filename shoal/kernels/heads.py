"""Queries and keys of latent attention put together in one pass over memory, forward and backward.

In PyTorch a rotary tail costs a split, a view as complex numbers, a product and a concatenation, a shared rotary key an
expansion and another one: a dozen passes per layer. These functions return None where they do not fit (not float32 on the
CPU, `torch.compile`); callers then take that path, which is also the reference (`model/mla.py`).
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.cpu.build import library
from shoal.kernels.cpu.calling import call


def rotate_tails(x_BSHQ: Tensor, rotation_BSP: Tensor, plain: int) -> Tensor | None:
    """Heads whose last columns, from `plain` on, are turned pair by pair; `rotation_BSP` is complex. None: does not fit."""
    if not _fits(x_BSHQ) or rotation_BSP.dtype != torch.complex64 or not rotation_BSP.is_contiguous():
        return None
    if x_BSHQ.shape[-1] - plain != 2 * rotation_BSP.shape[-1] or x_BSHQ.shape[:2] != rotation_BSP.shape[:2]:
        return None
    out: Tensor = _RotateTails.apply(x_BSHQ, torch.view_as_real(rotation_BSP), plain)
    return out


def expand_keys(up_BTHX: Tensor, shared_BTR: Tensor, plain: int) -> tuple[Tensor, Tensor] | None:
    """Keys `[B, T, H, plain + R]` and values `[B, T, H, U]` of the up-projection and the rotary key that heads share."""
    if not _fits(up_BTHX) or shared_BTR.dtype != torch.float32 or up_BTHX.shape[:2] != shared_BTR.shape[:2]:
        return None
    key, value = _ExpandKeys.apply(up_BTHX, shared_BTR, plain)
    return key, value


def latent_entries(down_BSW: Tensor, weight_C: Tensor, rotation_BSP: Tensor, eps: float) -> Tensor | None:
    """What the latent cache keeps: the first C columns normed, the rest turned pair by pair. None: does not fit."""
    if not _fits(down_BSW) or rotation_BSP.dtype != torch.complex64 or not rotation_BSP.is_contiguous():
        return None
    if down_BSW.shape[-1] - len(weight_C) != 2 * rotation_BSP.shape[-1] or down_BSW.shape[:2] != rotation_BSP.shape[:2]:
        return None
    if weight_C.dtype != torch.float32:
        return None
    out: Tensor = _LatentEntries.apply(down_BSW, weight_C, torch.view_as_real(rotation_BSP), eps)
    return out


class _RotateTails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHQ: Tensor, rotation_BSPX: Tensor, plain: int) -> Tensor:
        ctx.save_for_backward(rotation_BSPX)
        ctx.plain = plain
        return _turned(x_BSHQ, rotation_BSPX, plain, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rotation_BSPX,) = ctx.saved_tensors
        return _turned(grads[0].contiguous(), rotation_BSPX, ctx.plain, -1.0), None, None


class _ExpandKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up_BTHX: Tensor, shared_BTR: Tensor, plain: int) -> tuple[Tensor, Tensor]:
        *tokens, heads, width = up_BTHX.shape
        rotary = shared_BTR.shape[-1]
        ctx.sizes = (tokens[0] * tokens[1], heads, plain, rotary, width - plain)
        ctx.shapes = (up_BTHX.shape, shared_BTR.shape)
        key, value = up_BTHX.new_empty(*tokens, heads, plain + rotary), up_BTHX.new_empty(*tokens, heads, width - plain)
        call("expand_keys", up_BTHX, shared_BTR.contiguous(), key, value, *ctx.sizes)
        return key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_up, grad_shared = (grads[0].new_empty(shape) for shape in ctx.shapes)
        call("expand_keys_backward", grads[0].contiguous(), grads[1].contiguous(), grad_up, grad_shared, *ctx.sizes)
        return grad_up, grad_shared, None


class _LatentEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, down_BSW: Tensor, weight_C: Tensor, rotation_BSPX: Tensor, eps: float) -> Tensor:
        batch, length, width = down_BSW.shape
        ctx.sizes = (batch * length, len(weight_C), width - len(weight_C))
        entry_BSW, inverse_rms = torch.empty_like(down_BSW), down_BSW.new_empty(batch * length)
        call(
            "latent_entries", down_BSW, weight_C, rotation_BSPX, entry_BSW, inverse_rms, *ctx.sizes, ctypes.c_float(eps)
        )
        ctx.save_for_backward(down_BSW, weight_C, rotation_BSPX, inverse_rms)
        return entry_BSW

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        down_BSW, weight_C, rotation_BSPX, inverse_rms = ctx.saved_tensors
        grad_down, grad_weight = torch.empty_like(down_BSW), torch.zeros_like(weight_C)
        given = (grads[0].contiguous(), down_BSW, weight_C, rotation_BSPX, inverse_rms, grad_down, grad_weight)
        call("latent_entries_backward", *given, *ctx.sizes)
        return grad_down, grad_weight, None, None


def _turned(x_BSHQ: Tensor, rotation_BSPX: Tensor, plain: int, sign: float) -> Tensor:
    batch, length, heads, width = x_BSHQ.shape
    out = torch.empty_like(x_BSHQ)
    sizes = (batch * length, heads, plain, width - plain)
    call("rotate_tails", x_BSHQ, rotation_BSPX, out, *sizes, ctypes.c_float(sign))
    return out


def _fits(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous()
        and library() is not None
    )
