"""Which rule moves which parameter, and one handle for all of them.

AdamW as DeepSeek-V3 §4.2 uses it; or Muon for the matrices (attention, feed-forward, experts) with AdamW for embedding,
head, router and gains, the split of Moonlight and DeepSeek-V4. Weight decay touches matrices only. The balancing bias is
a buffer and belongs to no optimizer (`model.load_balance`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shoal.errors import ConfigError
from shoal.training.low_moments import LowMomentAdamW
from shoal.training.muon import Muon


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Rule and rates. Published V3: AdamW, betas 0.9 and 0.95, weight decay 0.1, clip 1.0."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-3
    """Peak rate of AdamW, and of Muon's matrices when `muon_learning_rate` is None."""
    muon_learning_rate: float | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    """Of AdamW, added to the root of the second moment. As large as the gradients' own entries it takes away full steps in
    directions that have next to no gradient; with a larger rate beside it, it was worse (docs/log.md, 2026-11-28)."""
    weight_decay: float = 0.1
    moments: Literal["fp32", "bf16"] = "fp32"
    """Of AdamW; bf16 halves their memory and is published V3's choice."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 never clips."""

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "muon"):
            raise ConfigError(f"optimizer kind {self.kind!r} is unknown; use 'adamw' or 'muon'.")
        if self.moments not in ("fp32", "bf16"):
            raise ConfigError(f"moments={self.moments!r} is unknown; use 'fp32' or 'bf16'.")
        if self.learning_rate <= 0 or (self.muon_learning_rate is not None and self.muon_learning_rate <= 0):
            raise ConfigError(f"learning_rate={self.learning_rate} must be positive.")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"beta1={self.beta1} and beta2={self.beta2} must be in [0, 1).")
        if self.weight_decay < 0 or self.clip_norm < 0 or not self.eps > 0:
            raise ConfigError("weight_decay and clip_norm must not be negative, and eps must be positive.")


class OptimizerSet:
    """All optimizers of a model behind one step."""

    def __init__(self, parameters: nn.Module | Mapping[str, nn.Parameter], config: OptimizerConfig) -> None:
        self.config = config
        self.named_parameters = dict(
            parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters.items()
        )
        self.optimizers = list(_build(self.named_parameters, config))
        self.multiplier = 1.0
        """Of the peak learning rates, as the schedule has it now."""
        self._peak_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def optimizer_of(self, parameter: Tensor) -> torch.optim.Optimizer:
        """Which of the optimizers moves it."""
        for optimizer in self.optimizers:
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer
        raise KeyError("no optimizer moves this parameter")

    def set_rate(self, multiplier: float) -> None:
        """Scale every peak learning rate by the schedule's `multiplier`."""
        self.multiplier = multiplier
        for optimizer, peaks in zip(self.optimizers, self._peak_rates):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * multiplier

    def step(self) -> float | None:
        """Clip, update, clear. Returns the gradient norm before clipping; None when it was not finite and nothing moved."""
        parameters = [p for p in self.named_parameters.values() if p.grad is not None]
        norm = self._norm([p.grad for p in parameters if p.grad is not None])
        is_finite = norm == norm and norm != float("inf")
        if is_finite:
            self._clip(norm)
            for optimizer in self.optimizers:
                optimizer.step()
            # PyTorch's fused AdamW writes without counting; whoever packed the weights tells by the count that they are old.
            torch.autograd.graph.increment_version(parameters)
        self.clear()
        return norm if is_finite else None

    def _norm(self, grads: Sequence[Tensor]) -> float:
        return float(torch.nn.utils.get_total_norm(grads, foreach=True))

    def _clip(self, norm: float) -> None:
        """Scale gradients down to the limit. Fused AdamW divides while it reads them, which saves a pass over all of them."""
        limit = self.config.clip_norm or float("inf")
        excess = max(1.0, (norm + 1e-6) / limit)
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.AdamW):
                optimizer.grad_scale = torch.tensor(excess) if excess > 1 else None  # type: ignore[attr-defined]
            elif excess > 1:
                grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                torch._foreach_mul_(grads, 1 / excess)

    def clear(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may orthogonalise it: hidden matrices and expert stacks, not embedding, head, router or gains."""
    return parameter.ndim >= 2 and not any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate."))


def _build(named: dict[str, nn.Parameter], config: OptimizerConfig) -> Iterator[torch.optim.Optimizer]:
    matrices = {name: p for name, p in named.items() if is_matrix(name, p)}
    if config.kind == "muon":
        rate = config.muon_learning_rate or config.learning_rate
        yield Muon(list(matrices.values()), lr=rate, weight_decay=config.weight_decay)
        named = {name: p for name, p in named.items() if name not in matrices}
    decayed = [p for p in named.values() if p.ndim >= 2]
    yield _adamw([(decayed, config.weight_decay), ([p for p in named.values() if p.ndim < 2], 0.0)], config)


def _adamw(groups: Iterable[tuple[list[nn.Parameter], float]], config: OptimizerConfig) -> torch.optim.Optimizer:
    parts = [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]
    betas = (config.beta1, config.beta2)
    if config.moments == "bf16":
        return LowMomentAdamW(parts, lr=config.learning_rate, betas=betas, eps=config.eps)
    return torch.optim.AdamW(
        parts,
        lr=config.learning_rate,
        betas=betas,
        eps=config.eps,
        fused=True,
    )
