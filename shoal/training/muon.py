"""Muon: momentum whose update is made orthogonal, for matrices and for stacks of expert matrices.

A gradient matrix is dominated by a few directions; replacing it by the nearest (semi-)orthogonal matrix moves all
directions alike. Five Newton-Schulz steps with tuned quintic coefficients do this with matrix products only, good to
singular values of roughly 0.7 to 1.2 (K. Jordan, 2024). Moonlight (arXiv 2502.16982) made it an everyday optimizer: weight
decay, and an update scaled to the root mean square that AdamW's has (0.2), so that AdamW's learning rates carry over.
PyTorch's own `torch.optim.Muon` takes plain matrices only; experts are stacks `[E, F, D]`, orthogonalised here slice by
slice in one batched product. On plain matrices both agree (`tests/training/test_muon.py`).

Embedding, head, router and gains belong to AdamW (`training.optimizer` splits them). A fused gate-and-up matrix counts as
one matrix.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from shoal.device import fast_dtype
from shoal.errors import ConfigError

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of `a X + b X X^T X + c (X X^T)^2 X` with the steepest slope at zero (K. Jordan, 2024)."""


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum with decoupled weight decay.

    Args:
        params: matrices `[F, D]` or stacks of them `[..., F, D]`, or groups of such.
        scale: "rms" multiplies the update by `0.2 sqrt(max(rows, columns))`, AdamW's usual size; "spectral" by
            `sqrt(max(1, rows / columns))`, K. Jordan's original.
        num_steps: Newton-Schulz steps.
        compute_dtype: of the products; None takes bfloat16 where hardware multiplies it.
    Raises:
        ConfigError: a parameter that is no matrix, or a rate that cannot be.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: Literal["rms", "spectral"] = "rms",
        num_steps: int = 5,
        coefficients: tuple[float, float, float] = QUINTIC,
        eps: float = 1e-7,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0 and 0 <= momentum < 1):
            raise ConfigError(
                f"lr={lr} and weight_decay={weight_decay} must not be negative, momentum={momentum} in [0, 1)."
            )
        if scale not in ("rms", "spectral"):
            raise ConfigError(f"scale={scale!r} is unknown; use 'rms' or 'spectral'.")
        if num_steps < 1:
            raise ConfigError(f"num_steps={num_steps} must be at least 1; published 5.")
        self.compute_dtype = compute_dtype
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "scale": scale,
            "num_steps": num_steps,
            "coefficients": coefficients,
            "eps": eps,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ConfigError(
                        f"Muon moves matrices; a parameter of shape {list(parameter.shape)} belongs to AdamW."
                    )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - group["momentum"])
        direction = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        dtype = self.compute_dtype or fast_dtype(parameter.device)
        update = orthogonalise(direction.to(dtype), group["num_steps"], group["coefficients"], group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        size = update_size(parameter.shape[-2], parameter.shape[-1], group["scale"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * size)


def orthogonalise(
    matrix_EFD: Tensor,
    num_steps: int = 5,
    coefficients: Iterable[float] = QUINTIC,
    eps: float = 1e-7,
) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, of each `[F, D]` matrix of a stack; in the dtype of the input."""
    a, b, c = coefficients
    *stack, rows, columns = matrix_EFD.shape
    x = matrix_EFD.reshape(-1, rows, columns)
    if rows > columns:
        x = x.transpose(1, 2)
    # The iteration converges for singular values up to 1; the Frobenius norm bounds them.
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(eps)
    for _ in range(num_steps):
        gram = x @ x.transpose(1, 2)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    if rows > columns:
        x = x.transpose(1, 2)
    return x.reshape(*stack, rows, columns)


def update_size(rows: int, columns: int, scale: str) -> float:
    """What an orthogonal update of this shape is multiplied by, beside the learning rate."""
    if scale == "rms":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
