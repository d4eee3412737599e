"""One name per operation; behind it the fastest kernel that fits the tensors, else the reference.

A kernel fits when the tensors are float32 (some: also bfloat16) on the CPU and the library could be built. Under
`torch.compile` the reference is traced instead, and the compiler fuses it. Callers see ordinary differentiable functions. Every pair is compared in `tests/kernels/test_dispatch.py`.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from shoal.kernels import reference
from shoal.kernels.cpu.build import library

LOW_OR_SINGLE = (torch.float32, torch.bfloat16)
LANES = 16
"""Widths of bfloat16 products are multiples of this."""


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last dimension, times `weight_D`; any leading shape."""
    if _fits(x, weight_D):
        return _RMSNorm.apply(x, weight_D, eps)
    return reference.rms_norm(x, weight_D, eps)


def swiglu_forward(gate_up_PX: Tensor) -> Tensor:
    """`silu(gate) * up`, `[P, 2F]` to `[P, F]`; not differentiable, see `swiglu_backward`."""
    if not _fits(gate_up_PX, dtypes=LOW_OR_SINGLE):
        return reference.swiglu(gate_up_PX)
    rows, double = gate_up_PX.shape
    act_PF = gate_up_PX.new_empty(rows, double // 2)
    _kernel("swiglu_forward", gate_up_PX.dtype)(_at(gate_up_PX), _at(act_PF), _int(rows), _int(double // 2))
    return act_PF


def swiglu_backward(grad_act_PF: Tensor, gate_up_PX: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient with respect to `gate_up_PX`, and the activation recomputed on the way."""
    if not _fits(grad_act_PF, gate_up_PX, dtypes=LOW_OR_SINGLE):
        gate_PF, up_PF = gate_up_PX.chunk(2, dim=-1)
        silu_PF = torch.nn.functional.silu(gate_PF)
        grad_gate_PF = torch.ops.aten.silu_backward(grad_act_PF * up_PF, gate_PF)
        return torch.cat([grad_gate_PF, grad_act_PF * silu_PF], dim=-1), silu_PF * up_PF
    rows, width = grad_act_PF.shape
    grad_gate_up_PX, act_PF = torch.empty_like(gate_up_PX), torch.empty_like(grad_act_PF)
    kernel = _kernel("swiglu_backward", gate_up_PX.dtype)
    kernel(_at(grad_act_PF), _at(gate_up_PX), _at(grad_gate_up_PX), _at(act_PF), _int(rows), _int(width))
    return grad_gate_up_PX, act_PF


def gather_rows(x_MD: Tensor, token_P: Tensor, dtype: torch.dtype) -> Tensor:
    """Row `token_P[p]` of `x_MD` for every slot p, cast to `dtype`; not differentiable."""
    if not _fits(x_MD) or dtype not in LOW_OR_SINGLE:
        return reference.gather_rows(x_MD, token_P, dtype)
    out_PD = torch.empty(len(token_P), x_MD.shape[1], dtype=dtype)
    _kernel("gather_rows", dtype)(_at(x_MD), _at(token_P), _at(out_PD), _int(len(token_P)), _int(x_MD.shape[1]))
    return out_PD


def reduce_slots(x_PD: Tensor, slot_MK: Tensor, weight_MK: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`sum over k of weight[m, k] * x[slot[m, k]]` in `dtype`; without weights the plain sum. Not differentiable."""
    x_PD = x_PD.contiguous()
    if not _fits(x_PD, dtypes=LOW_OR_SINGLE) or dtype != torch.float32 or not slot_MK.is_contiguous():
        return reference.reduce_slots(x_PD, slot_MK, weight_MK, dtype)
    out_MD = torch.empty(len(slot_MK), x_PD.shape[1])
    weight = None if weight_MK is None else weight_MK.float().contiguous()
    sizes = (_int(len(slot_MK)), _int(slot_MK.shape[1]), _int(x_PD.shape[1]))
    where = ctypes.c_void_p(None) if weight is None else _at(weight)
    _kernel("reduce_slots", x_PD.dtype)(_at(x_PD), _at(slot_MK), where, _at(out_MD), *sizes)
    return out_MD


def reduce_slots_backward(grad_MD: Tensor, x_PD: Tensor, slot_MK: Tensor, weight_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `reduce_slots` for `x_PD` (zero in slots of no token) and `weight_MK`."""
    grad_MD = grad_MD.contiguous()
    fits = _fits(grad_MD) and _fits(x_PD, dtypes=LOW_OR_SINGLE) and weight_MK.dtype == torch.float32
    if not fits or not slot_MK.is_contiguous():
        return reference.reduce_slots_backward(grad_MD, x_PD, slot_MK, weight_MK)
    grad_PD, grad_weight_MK = torch.zeros_like(x_PD), torch.empty(weight_MK.shape)
    arrays = (grad_MD, x_PD, slot_MK, weight_MK.contiguous(), grad_PD, grad_weight_MK)
    sizes = (_int(len(slot_MK)), _int(slot_MK.shape[1]), _int(x_PD.shape[1]))
    _kernel("reduce_slots_backward", x_PD.dtype)(*map(_at, arrays), *sizes)
    return grad_PD, grad_weight_MK


def cross_entropy_rows_(score_MV: Tensor, label_M: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row in nats (float32) and its best token; `score_MV` becomes the gradient, softmax - onehot."""
    if not _fits(score_MV, dtypes=LOW_OR_SINGLE):
        return reference.cross_entropy_rows_(score_MV, label_M)
    loss_M, best_M = torch.empty(len(label_M)), torch.empty_like(label_M)
    arrays = (score_MV, label_M.contiguous(), loss_M, best_M)
    _kernel("cross_entropy_rows", score_MV.dtype)(*map(_at, arrays), _int(len(label_M)), _int(score_MV.shape[1]))
    return loss_M, best_M


def log_probability_rows(score_MV: Tensor, token_M: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's token under softmax(scores), and the entropy there, in nats."""
    if not _fits(score_MV):
        return reference.log_probability_rows(score_MV, token_M)
    logprob_M, entropy_M = score_MV.new_empty(len(token_M)), score_MV.new_empty(len(token_M))
    arrays = (score_MV, token_M.contiguous(), logprob_M, entropy_M)
    _kernel("log_probability_rows", score_MV.dtype)(*map(_at, arrays), _int(len(token_M)), _int(score_MV.shape[1]))
    return logprob_M, entropy_M


def document_attention(
    query_BSHQ: Tensor,
    key_BSHQ: Tensor,
    value_BSHU: Tensor,
    first_BS: Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Attention of each position to positions `first_BS` up to itself; None when no kernel fits (use fused attention).

    Args:
        first_BS: int64, `0 <= first_BS[b, s] <= s`: where the document of position s begins in its row.
        dtype: of the products; bfloat16 is taken where the processor multiplies it, sums and softmax stay float32.
    Returns:
        `[B, S, H, U]`.
    """
    if not _fits(query_BSHQ, key_BSHQ) or value_BSHU.dtype != torch.float32:
        return None
    even = query_BSHQ.shape[-1] % LANES == 0 and value_BSHU.shape[-1] % LANES == 0
    low = dtype == torch.bfloat16 and even and bool(library().shoal_multiplies_bf16())  # type: ignore[union-attr]
    out: Tensor = _DocumentAttention.apply(query_BSHQ, key_BSHQ, value_BSHU, first_BS, scale, "_bf16" if low else "")
    return out


def sample_rows(logit_NV: Tensor, temperature_N: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row; see `reference.sample_rows`. Not differentiable."""
    logit_NV = logit_NV.contiguous()
    if not _fits(logit_NV):
        return reference.sample_rows(logit_NV, temperature_N, uniform_N)
    rows, width = logit_NV.shape
    token_N = torch.empty(rows, dtype=torch.long)
    logprob_N, finite_N = torch.empty(rows), torch.empty(rows, dtype=torch.bool)
    arrays = (logit_NV, temperature_N.float().contiguous(), uniform_N.double().contiguous())
    outputs = (token_N, logprob_N, finite_N)
    _kernel("sample_rows")(*map(_at, arrays), _int(rows), _int(width), *map(_at, outputs))
    return outputs


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        width = x.shape[-1]
        rows = x.numel() // max(width, 1)
        inverse_rms = x.new_empty(rows)
        _kernel("rms_norm_forward")(
            _at(x), _at(weight_D), _at(out), _at(inverse_rms), _int(rows), _int(width), ctypes.c_float(eps)
        )
        ctx.save_for_backward(x, weight_D, inverse_rms)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, inverse_rms = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight_D)
        arrays = (grad, x, weight_D, inverse_rms, grad_x, grad_weight)
        _kernel("rms_norm_backward")(*(_at(array) for array in arrays), _int(len(inverse_rms)), _int(x.shape[-1]))
        return grad_x, grad_weight, None


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, first_BS: Tensor, scale: float, form: str
    ) -> Tensor:
        batch, length, heads, qk_width = query.shape
        v_width = value.shape[-1]
        value, step = _evenly_spaced_heads(value)
        first_BS = first_BS.contiguous()
        out = query.new_empty(batch, length, heads, v_width)
        log_sum = query.new_empty(batch, heads, length)
        sizes = [_int(size) for size in (batch, length, heads, qk_width, v_width, step)]
        arrays = (query, key, value, first_BS, out, log_sum)
        _kernel("document_attention_forward" + form)(*(_at(array) for array in arrays), *sizes, ctypes.c_float(scale))
        ctx.save_for_backward(query, key, value, first_BS, out, log_sum)
        ctx.sizes, ctx.scale, ctx.kernel = sizes, scale, "document_attention_backward" + form
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, first_BS, out, log_sum = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(out)
        arrays = (grads[0].contiguous(), query, key, value, first_BS, out, log_sum, grad_query, grad_key, grad_value)
        _kernel(ctx.kernel)(*(_at(array) for array in arrays), *ctx.sizes, ctypes.c_float(ctx.scale))
        return grad_query, grad_key, grad_value, None, None, None


def _evenly_spaced_heads(value_BSHU: Tensor) -> tuple[Tensor, int]:
    """The tensor itself when it is a slice `[..., a:b]` of a contiguous one, else a contiguous copy; and the head step."""
    _, length, heads, _ = value_BSHU.shape
    step = value_BSHU.stride(2)
    if value_BSHU.stride() == (length * heads * step, heads * step, step, 1):
        return value_BSHU, step
    return value_BSHU.contiguous(), value_BSHU.shape[-1]


def _fits(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    dtype = tensors[0].dtype
    return (
        not torch.compiler.is_compiling()
        and dtype in dtypes
        and all(t.dtype == dtype and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        and library() is not None
    )


def _kernel(name: str, dtype: torch.dtype | None = None) -> Any:
    suffix = {None: "", torch.float32: "_f32", torch.bfloat16: "_bf16"}[dtype]
    return getattr(library(), name + suffix)


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


_int = ctypes.c_int64
