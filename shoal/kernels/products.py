"""Matrix products of training in bfloat16, with what surrounds them: linear layers, SwiGLU networks, the head.

PyTorch's products are good, but a small model pays more for the passes around them: casts, gathers, a call per expert. Here
an input is cast while it is gathered, gated while it is in registers, and one call runs all experts, forward or backward.
Weights are packed anew for every pass (they change every step), once for both directions.

These functions return None where they do not fit: other dtypes and devices, widths that are no multiple of 16, `torch.compile`,
and processors with matrix units (AMX), whose products PyTorch reaches and these kernels do not. Callers then take the
PyTorch path, which is also the reference (`model/layers.py`, `model/experts.py`; `tests/kernels/test_products.py`).
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from shoal.device import describe_machine
from shoal.kernels.cpu.build import library
from shoal.kernels.cpu.calling import call
from shoal.kernels.dispatch import reduce_slots

LANES = 16
KEPT_BYTES = 512 << 20
"""Memory that a policy's head may spend on its softmax between the passes, which saves two of the backward's three products."""


def linear(x_MD: Tensor, weight_FD: Tensor) -> Tensor | None:
    """`x @ weight.T` with both rounded to bfloat16 and summed in float32; differentiable. None: no kernel fits."""
    if not _fits(x_MD, weight_FD):
        return None
    out_MF: Tensor = _Linear.apply(x_MD, weight_FD)
    return out_MF


def swiglu(x_MD: Tensor, gate_up_XD: Tensor, down_DF: Tensor) -> Tensor | None:
    """`down(silu(gate(x)) * up(x))`, products as in `linear`. None: no kernel fits."""
    if not _fits(x_MD, gate_up_XD, down_DF) or down_DF.shape[1] % LANES:
        return None
    out_MD: Tensor = _SwiGLU.apply(x_MD, gate_up_XD, down_DF)
    return out_MD


def swiglu_experts(
    x_MD: Tensor, weight_MK: Tensor, expert_MK: Tensor, gate_up_EXD: Tensor, down_EDF: Tensor
) -> Tensor | None:
    """Sum over the chosen experts of weight times their SwiGLU, `[M, D]`. None: no kernel fits."""
    if not _fits(x_MD, gate_up_EXD, down_EDF) or down_EDF.shape[2] % LANES or weight_MK.dtype != torch.float32:
        return None
    out_MD: Tensor = _RoutedSwiGLU.apply(x_MD, weight_MK, expert_MK, gate_up_EXD, down_EDF)
    return out_MD


def head_cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, label_M: Tensor) -> tuple[Tensor, Tensor] | None:
    """Summed cross-entropy in nats under the head, differentiable, and each row's best token. None: no kernel fits.

    Scores are float32 sums of bfloat16 products; their array never exists.
    """
    if not _fits(hidden_MD, weight_VD):
        return None
    total, best_M = _HeadCrossEntropy.apply(hidden_MD, weight_VD, label_M)
    return total, best_M


def head_log_probability(
    hidden_MD: Tensor, weight_VD: Tensor, token_M: Tensor, temperature: float
) -> tuple[Tensor, Tensor] | None:
    """Log-probability of `token_M` under the head, differentiable, and the entropy in nats there. None: no kernel fits."""
    if not _fits(hidden_MD, weight_VD):
        return None
    logprob_M, entropy_M = _HeadLogProbability.apply(hidden_MD, weight_VD, token_M, temperature)
    return logprob_M, entropy_M


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_FD: Tensor) -> Tensor:
        x_MD = x_MD.contiguous()
        panels, ctx.panels_back = _pack(weight_FD, any(ctx.needs_input_grad))
        ctx.save_for_backward(x_MD)
        (rows, cols), outs = x_MD.shape, weight_FD.shape[0]
        out_MF = x_MD.new_empty(rows, outs)
        call("linear_forward", x_MD, panels, out_MF, rows, cols, outs)
        return out_MF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        (x_MD,) = ctx.saved_tensors
        grad_MF = grads[0].contiguous()
        (rows, cols), outs = x_MD.shape, grad_MF.shape[1]
        grad_x = torch.empty_like(x_MD) if ctx.needs_input_grad[0] else None
        grad_weight = x_MD.new_empty(outs, cols)
        call("linear_backward", grad_MF, x_MD, ctx.panels_back, grad_x, grad_weight, rows, cols, outs)
        return grad_x, grad_weight


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, gate_up_XD: Tensor, down_DF: Tensor) -> Tensor:
        x_MD = x_MD.contiguous()
        gate_up, down = _pack_network(ctx, gate_up_XD, down_DF)
        rows, hidden = x_MD.shape
        ctx.sizes = (rows, hidden, down_DF.shape[1], 1, 1)
        kept, out_MD = x_MD.new_empty(rows, len(gate_up_XD), dtype=torch.bfloat16), torch.empty_like(x_MD)
        end = torch.tensor([rows])
        call("swiglu_experts_forward", x_MD, None, end, gate_up, down, kept, out_MD, *ctx.sizes)
        ctx.save_for_backward(x_MD, kept, end)
        return out_MD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_MD, kept, end = ctx.saved_tensors
        _, hidden, width, _, _ = ctx.sizes
        grad_x, grad_gate_up, grad_down = (
            torch.empty_like(x_MD),
            x_MD.new_empty(2 * width, hidden),
            x_MD.new_empty(hidden, width),
        )
        given = (grads[0].contiguous(), x_MD, None, None, end, *ctx.panels_back, kept)
        call("swiglu_experts_backward", *given, grad_x, None, grad_gate_up, grad_down, *ctx.sizes)
        return grad_x, grad_gate_up, grad_down


class _RoutedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, weight_MK: Tensor, expert_MK: Tensor, gate_up_EXD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        x_MD, weight_MK = x_MD.contiguous(), weight_MK.contiguous()
        gate_up, down = _pack_network(ctx, gate_up_EXD, down_EDF)
        experts, hidden, width = down_EDF.shape
        slot_MK, choice_P, end_E = sort_slots(expert_MK, experts)
        ctx.sizes = (len(choice_P), hidden, width, experts, expert_MK.shape[1])
        kept = x_MD.new_empty(len(choice_P), 2 * width, dtype=torch.bfloat16)
        out_PD = x_MD.new_empty(len(choice_P), hidden, dtype=torch.bfloat16)
        call("swiglu_experts_forward", x_MD, choice_P, end_E, gate_up, down, kept, out_PD, *ctx.sizes)
        ctx.save_for_backward(x_MD, weight_MK, slot_MK, choice_P, end_E, kept)
        return reduce_slots(out_PD, slot_MK, weight_MK, torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        x_MD, weight_MK, slot_MK, choice_P, end_E, kept = ctx.saved_tensors
        _, hidden, width, experts, _ = ctx.sizes
        grad_PD = x_MD.new_empty(len(choice_P), hidden, dtype=torch.bfloat16)
        grad_weight, grad_gate_up, grad_down = (
            torch.empty_like(weight_MK),
            x_MD.new_empty(experts, 2 * width, hidden),
            x_MD.new_empty(experts, hidden, width),
        )
        given = (grads[0].contiguous(), x_MD, weight_MK, choice_P, end_E, *ctx.panels_back, kept)
        call("swiglu_experts_backward", *given, grad_PD, grad_weight, grad_gate_up, grad_down, *ctx.sizes)
        return reduce_slots(grad_PD, slot_MK, None, torch.float32), grad_weight, None, grad_gate_up, grad_down


class _HeadCrossEntropy(torch.autograd.Function):
    """Gradients are taken in the forward pass, while the scores are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, label_M: Tensor) -> tuple[Tensor, Tensor]:
        hidden_MD, label_M = hidden_MD.contiguous(), label_M.contiguous()
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        panels, panels_back = _pack(weight_VD, needs_hidden or needs_weight)
        (rows, width), vocabulary = hidden_MD.shape, len(weight_VD)
        loss_M, best_M = hidden_MD.new_empty(rows), torch.empty_like(label_M)
        grad_hidden = torch.empty_like(hidden_MD) if needs_hidden or needs_weight else None
        grad_weight = torch.empty_like(weight_VD) if needs_weight else None
        given = (hidden_MD, panels, panels_back, label_M, loss_M, best_M, grad_hidden, grad_weight)
        call("head_cross_entropy", *given, rows, width, vocabulary)
        ctx.grads = (grad_hidden, grad_weight)
        ctx.mark_non_differentiable(best_M)
        return loss_M.sum(), best_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.grads
        scale = grads[0]
        return (
            grad_hidden * scale if ctx.needs_input_grad[0] else None,
            grad_weight * scale if grad_weight is not None else None,
            None,
        )


class _HeadLogProbability(torch.autograd.Function):
    """What weights the rows is known only after all log-probabilities are, and is a factor of all that the gradients need."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, token_M: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        hidden_MD, token_M = hidden_MD.contiguous(), token_M.contiguous()
        needed = any(ctx.needs_input_grad)
        ctx.panels, ctx.panels_back = _pack(weight_VD, needed)
        (rows, width), vocabulary = hidden_MD.shape, len(weight_VD)
        ctx.inverse, ctx.sizes = ctypes.c_float(1 / temperature), (rows, width, vocabulary)
        logprob_M, entropy_M, log_sum_M = (hidden_MD.new_empty(rows) for _ in range(3))
        kept_rows = _kept_rows(rows, vocabulary) if needed else 0
        power = torch.empty(kept_rows + kept_rows % 2, vocabulary, dtype=torch.bfloat16)
        ctx.kept = (power, hidden_MD.new_empty(kept_rows, width), hidden_MD.new_empty(kept_rows), kept_rows)
        given, outputs = (
            (hidden_MD, ctx.panels, ctx.panels_back, token_M, ctx.inverse),
            (logprob_M, entropy_M, log_sum_M),
        )
        call("head_log_probability", *given, *outputs, *ctx.kept, *ctx.sizes)
        ctx.save_for_backward(hidden_MD, token_M, log_sum_M)
        ctx.mark_non_differentiable(entropy_M)
        return logprob_M, entropy_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_MD, token_M, log_sum_M = ctx.saved_tensors
        _, width, vocabulary = ctx.sizes
        row_weight_M = grads[0] * -ctx.inverse.value
        grad_hidden = torch.empty_like(hidden_MD)
        grad_weight = hidden_MD.new_empty(vocabulary, width) if ctx.needs_input_grad[1] else None
        given = (hidden_MD, ctx.panels, ctx.panels_back, token_M, ctx.inverse, log_sum_M, row_weight_M)
        call("head_log_probability_backward", *given, *ctx.kept, grad_hidden, grad_weight, *ctx.sizes)
        return grad_hidden, grad_weight, None, None


def _kept_rows(rows: int, vocabulary: int) -> int:
    """Rows whose softmax is kept for the backward pass, `KEPT_BYTES` of them at most; the others are made again."""
    kernels = library()
    assert kernels is not None
    kernels.head_kept_rows.restype = ctypes.c_int64
    return int(kernels.head_kept_rows(ctypes.c_int64(rows), ctypes.c_int64(KEPT_BYTES // (2 * vocabulary))))


def sort_slots(expert_MK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slot of each choice `[M, K]`, choice (token * K + k) of each slot `[P]`, and the end of each expert's slots `[E]`."""
    expert_MK = expert_MK.contiguous()
    slot_MK, choice_P = torch.empty_like(expert_MK), torch.empty(expert_MK.numel(), dtype=torch.long)
    end_E = torch.empty(num_experts, dtype=torch.long)
    call("sort_slots", expert_MK, expert_MK.numel(), num_experts, slot_MK, choice_P, end_E)
    return slot_MK, choice_P, end_E


def _pack_network(ctx: Any, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Panels for the forward pass; those for the backward pass are left on `ctx`."""
    needed = any(ctx.needs_input_grad)
    gate_up_panels, gate_up_back = _pack(gate_up, needed, gated=True)
    down_panels, down_back = _pack(down, needed)
    ctx.panels_back = (gate_up_back, down_back)
    return gate_up_panels, down_panels


def _pack(weight: Tensor, with_backward: bool, gated: bool = False) -> tuple[Tensor, Tensor | None]:
    """Panels of a matrix `[F, D]` or a stack of them for the forward product and for the gradient of its input."""
    weight = weight.detach()
    *stack, rows, cols = weight.shape
    forward = torch.empty(weight.numel(), dtype=torch.bfloat16)
    backward = torch.empty_like(forward) if with_backward else None
    call("pack_weights", weight, stack[0] if stack else 1, rows, cols, ctypes.c_int32(gated), forward, backward)
    return forward, backward


def _fits(x: Tensor, *weights: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and len(x) > 0
        and x.shape[-1] == weights[0].shape[-1]
        and all(w.dtype == torch.float32 and w.is_contiguous() for w in weights)
        and not any(size % LANES for w in weights for size in w.shape[-2:])
        and _pays()
    )


@functools.cache
def _pays() -> bool:
    """Whether this processor multiplies bfloat16 in vectors, and has no matrix units that do it faster."""
    kernels = library()
    if kernels is None or any(name.startswith("amx") for name in describe_machine().instructions):
        return False
    return bool(kernels.shoal_multiplies_bf16())
