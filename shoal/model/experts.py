"""Feed-forward networks: SwiGLU once (dense, shared expert) and many times (routed experts).

Gate and up projection are one matrix `[2F, D]`, gate rows first; routed experts are stacks `[E, 2F, D]` and
`[E, D, F]`, the in-memory layout of transformers. Tokens are sorted by expert, so that each expert sees one contiguous
block of rows: the grouped matrix products of DeepSeekMoE without dropping a token. On a GPU one `grouped_mm` call does
all experts; on the CPU a loop over plain products is faster than its fallback, and blocks are padded to a multiple of
`ROW_PADDING`, because oneDNN builds (and caches) one bfloat16 kernel per shape and free-running expert counts would make
it build one per step.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from shoal.config import ModelConfig
from shoal.kernels import products
from shoal.kernels.dispatch import (
    gather_rows,
    reduce_slots,
    reduce_slots_backward,
    swiglu_backward,
    swiglu_forward,
)
from shoal.model.fp8_products import Fp8GroupedSwiGLU
from shoal.model.layers import Linear
from shoal.quant.fp8_recipe import Fp8Recipe

ROW_PADDING = 32


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, gate and up as one product."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.down_proj.compute_dtype or x.dtype
        flat_MD = x.reshape(-1, x.shape[-1])
        if dtype == torch.bfloat16 and self.down_proj.fp8 is None:
            fused_MD = products.swiglu(flat_MD, self.gate_up_proj.weight, self.down_proj.weight)
            if fused_MD is not None:
                return fused_MD.view_as(x)
        one_group = [(0, len(flat_MD))]
        weights = (self.gate_up_proj.weight.unsqueeze(0), self.down_proj.weight.unsqueeze(0))
        if self.down_proj.fp8 is not None:
            product: Tensor = Fp8GroupedSwiGLU.apply(flat_MD, *weights, one_group, self.down_proj.fp8)
            return product.view_as(x)
        out: Tensor = GroupedSwiGLU.apply(flat_MD.to(dtype), *weights, one_group, dtype)
        return out.to(x.dtype).view_as(x)


class Experts(nn.Module):
    """The routed experts of one layer, as two stacked parameters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.compute_dtype: torch.dtype | None = None
        self.fp8: Fp8Recipe | None = None

    def forward(self, x_MD: Tensor, weight_MK: Tensor, expert_MK: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, `[M, D]` in the dtype of `x_MD`."""
        if self.fp8 is not None:
            return self._fp8(x_MD, weight_MK, expert_MK, self.fp8)
        dtype = self.compute_dtype or x_MD.dtype
        if dtype == torch.bfloat16:
            fused_MD = products.swiglu_experts(x_MD, weight_MK, expert_MK, self.gate_up_proj, self.down_proj)
            if fused_MD is not None:
                return fused_MD
        layout = SlotLayout.of(expert_MK, len(self.gate_up_proj), pad=ROW_PADDING if dtype != x_MD.dtype else 1)
        slot_PD: Tensor = Dispatch.apply(x_MD, layout, dtype)
        if x_MD.is_cuda:
            out_PD = grouped_swiglu_cuda(slot_PD, self.gate_up_proj, self.down_proj, layout.end_E)
        else:
            out_PD = GroupedSwiGLU.apply(slot_PD, self.gate_up_proj, self.down_proj, layout.groups, dtype)
        return Combine.apply(out_PD, weight_MK, layout, x_MD.dtype)

    def _fp8(self, x_MD: Tensor, weight_MK: Tensor, expert_MK: Tensor, recipe: Fp8Recipe) -> Tensor:
        """The same with FP8 products; the sum over choices stays in the dtype of the residual stream."""
        layout = SlotLayout.of(expert_MK, len(self.gate_up_proj), pad=1)
        slot_PD: Tensor = Dispatch.apply(x_MD, layout, x_MD.dtype)
        out_PD = Fp8GroupedSwiGLU.apply(slot_PD, self.gate_up_proj, self.down_proj, layout.groups, recipe)
        return Combine.apply(out_PD, weight_MK, layout, x_MD.dtype)


class SlotLayout:
    """Where each (token, choice) pair sits once tokens are sorted by expert.

    Slots P are the rows of the sorted buffer: each expert owns one contiguous block, padded at its end.
    """

    def __init__(self, slot_MK: Tensor, token_P: Tensor, groups: list[tuple[int, int]], end_E: Tensor) -> None:
        self.slot_MK = slot_MK
        """The slot of each token's k-th choice."""
        self.token_P = token_P
        """The token of each slot; padding slots name token 0 and are never read."""
        self.groups = groups
        """Start and stop of each expert's block, padding included."""
        self.end_E = end_E
        """The stops as an int32 tensor, for grouped_mm."""

    @classmethod
    def of(cls, expert_MK: Tensor, num_experts: int, pad: int) -> "SlotLayout":
        """Lay out the choices; `pad` rounds every block up to a multiple."""
        num_tokens, per_token = expert_MK.shape
        flat = expert_MK.reshape(-1)
        count_E = torch.bincount(flat, minlength=num_experts)
        size_E = (count_E + pad - 1) // pad * pad
        end_E = size_E.cumsum(0)
        order = flat.argsort(stable=True)
        first_E = count_E.cumsum(0) - count_E
        shift = (end_E - size_E) - first_E
        slot_sorted = torch.arange(len(flat), device=flat.device) + shift[flat[order]]
        slot_MK = torch.empty_like(flat).scatter_(0, order, slot_sorted).view(num_tokens, per_token)
        ends = end_E.tolist()
        token_P = torch.zeros(ends[-1], dtype=torch.long, device=flat.device)
        token_P[slot_sorted] = order // per_token
        starts = [0, *ends[:-1]]
        return cls(slot_MK, token_P, list(zip(starts, ends)), end_E.to(torch.int32))


class Dispatch(torch.autograd.Function):
    """Copy each token to its K slots; backward sums the K gradients of a token without a scatter."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, layout: SlotLayout, dtype: torch.dtype) -> Tensor:
        ctx.layout, ctx.dtype = layout, x_MD.dtype
        return gather_rows(x_MD, layout.token_P, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return reduce_slots(grads[0], ctx.layout.slot_MK, None, ctx.dtype), None, None


class Combine(torch.autograd.Function):
    """Weighted sum of a token's K slots, accumulated in the dtype of the residual stream."""

    @staticmethod
    def forward(ctx: Any, out_PD: Tensor, weight_MK: Tensor, layout: SlotLayout, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(out_PD, weight_MK)
        ctx.slot_MK = layout.slot_MK
        return reduce_slots(out_PD, layout.slot_MK, weight_MK, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        out_PD, weight_MK = ctx.saved_tensors
        grad_PD, grad_weight_MK = reduce_slots_backward(grads[0], out_PD, ctx.slot_MK, weight_MK)
        return grad_PD, grad_weight_MK, None, None


class GroupedSwiGLU(torch.autograd.Function):
    """SwiGLU of each block of rows with its own weights; keeps only the gate-up product and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, x_PD: Tensor, gate_up_EXD: Tensor, down_EDF: Tensor, groups: list[tuple[int, int]], dtype: torch.dtype
    ) -> Tensor:
        low_gate_up, low_down = gate_up_EXD.to(dtype), down_EDF.to(dtype)
        gate_up_PX = x_PD.new_empty(len(x_PD), low_gate_up.shape[1])
        for expert, (start, stop) in enumerate(groups):
            if stop > start:
                torch.mm(x_PD[start:stop], low_gate_up[expert].t(), out=gate_up_PX[start:stop])
        act_PF = swiglu_forward(gate_up_PX)
        out_PD = torch.empty_like(x_PD)
        for expert, (start, stop) in enumerate(groups):
            if stop > start:
                torch.mm(act_PF[start:stop], low_down[expert].t(), out=out_PD[start:stop])
        ctx.save_for_backward(x_PD, gate_up_PX, low_gate_up, low_down)
        ctx.groups, ctx.weight_dtypes = groups, (gate_up_EXD.dtype, down_EDF.dtype)
        return out_PD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x_PD, gate_up_PX, gate_up_EXD, down_EDF = ctx.saved_tensors
        grad_PD = grads[0].contiguous()
        grad_act_PF = gate_up_PX.new_empty(len(x_PD), down_EDF.shape[2])
        for expert, (start, stop) in enumerate(ctx.groups):
            if stop > start:
                torch.mm(grad_PD[start:stop], down_EDF[expert], out=grad_act_PF[start:stop])
        grad_gate_up_PX, act_PF = swiglu_backward(grad_act_PF, gate_up_PX)
        grad_down = torch.zeros_like(down_EDF)
        grad_x_PD = torch.empty_like(x_PD)
        grad_gate_up = torch.zeros_like(gate_up_EXD)
        for expert, (start, stop) in enumerate(ctx.groups):
            if stop > start:
                torch.mm(grad_gate_up_PX[start:stop], gate_up_EXD[expert], out=grad_x_PD[start:stop])
                torch.mm(grad_gate_up_PX[start:stop].t(), x_PD[start:stop], out=grad_gate_up[expert])
                torch.mm(grad_PD[start:stop].t(), act_PF[start:stop], out=grad_down[expert])
        dtypes = ctx.weight_dtypes
        return grad_x_PD, grad_gate_up.to(dtypes[0]), grad_down.to(dtypes[1]), None, None


def grouped_swiglu_cuda(x_PD: Tensor, gate_up_EXD: Tensor, down_EDF: Tensor, end_E: Tensor) -> Tensor:
    """The same through `grouped_mm`: one kernel for all experts. Weights are cast to the dtype of `x_PD`."""
    grouped_mm = torch.nn.functional.grouped_mm
    gate_PF, up_PF = grouped_mm(x_PD, gate_up_EXD.to(x_PD.dtype).transpose(-2, -1), offs=end_E).chunk(2, dim=-1)
    out_PD: Tensor = grouped_mm(silu(gate_PF) * up_PF, down_EDF.to(x_PD.dtype).transpose(-2, -1), offs=end_E)
    return out_PD


def experts_reference(
    x_MD: Tensor, gate_up_EXD: Tensor, down_EDF: Tensor, weight_MK: Tensor, expert_MK: Tensor
) -> Tensor:
    """The definition, token by token and choice by choice: slow, obvious, differentiable. For tests."""
    rows = []
    for x_D, weight_K, expert_K in zip(x_MD, weight_MK, expert_MK):
        row_D = torch.zeros_like(x_D)
        for weight, expert in zip(weight_K, expert_K):
            gate_F, up_F = (gate_up_EXD[expert] @ x_D).chunk(2)
            row_D = row_D + weight * (down_EDF[expert] @ (silu(gate_F) * up_F))
        rows.append(row_D)
    return torch.stack(rows)
