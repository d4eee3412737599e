"""One optimizer step: micro-batches in, moved weights, moved balance biases and numbers out.

Every stage (pretraining, fine-tuning, reinforcement learning) ends its step in `finish_step`, so that clipping, skipping
of broken gradients and the bias update exist once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from shoal.model.load_balance import max_violation, update_biases
from shoal.model.router import Routing
from shoal.model.transformer import Transformer
from shoal.text.packing import Batch
from shoal.training.loss import IGNORED, LossWeights, batch_loss, mtp_acceptance
from shoal.training.optimizer import OptimizerSet


@dataclass
class StepResult:
    """What a step did, summed over its micro-batches."""

    loss_sum: float = 0.0
    num_labels: int = 0
    num_tokens: int = 0
    mtp_loss_sum: float = 0.0
    mtp_labels: int = 0
    accepted: int = 0
    drafted: int = 0
    balance_loss: float = 0.0
    grad_norm: float | None = None
    """None when the step was skipped: no labels, or gradients that are not finite."""
    count_LE: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    """Tokens per MoE layer and expert."""

    @property
    def max_violation(self) -> float | None:
        """MaxVio of the worst layer; None without experts."""
        return float(max_violation(self.count_LE).max()) if self.count_LE.numel() else None

    def metrics(self) -> dict[str, float | None]:
        """The part of a metrics line that a step knows."""
        return {
            "loss": self.loss_sum / self.num_labels if self.num_labels else None,
            "mtp_loss": self.mtp_loss_sum / self.mtp_labels if self.mtp_labels else None,
            "mtp_acceptance": self.accepted / self.drafted if self.drafted else None,
            "balance_loss": self.balance_loss,
            "grad_norm": self.grad_norm,
            "max_vio": self.max_violation,
        }


def train_step(
    model: Transformer,
    optimizers: OptimizerSet,
    micro_batches: Sequence[Batch],
    *,
    weights: LossWeights,
    bias_speed: float,
) -> StepResult:
    """Gradients of all micro-batches together, then one update.

    Dividing by the labels of the whole step makes the result independent of how it is cut into micro-batches. A step
    without any label changes nothing and has `grad_norm` None.
    """
    result = StepResult()
    device = model.embed_tokens.weight.device
    step_tokens = int(sum((batch.label_BS != IGNORED).sum() for batch in micro_batches))
    if step_tokens == 0:
        return result
    tracker = CountTracker(model)
    for batch in micro_batches:
        tensors = tensors_of(batch, device)
        loss = batch_loss(model, *tensors, weights=weights, step_tokens=step_tokens)
        loss.objective.backward()
        tracker.add(loss.routing)
        result.loss_sum += float(loss.main.total.detach())
        result.num_labels += loss.main.num_tokens
        result.num_tokens += int((tensors[2] >= 0).sum())
        result.mtp_loss_sum += sum(float(part.total.detach()) for part in loss.mtp)
        result.mtp_labels += sum(part.num_tokens for part in loss.mtp)
        result.balance_loss += loss.balance * loss.main.num_tokens / step_tokens
        for accepted, drafted in mtp_acceptance(loss.main, loss.mtp)[:1]:
            result.accepted += accepted
            result.drafted += drafted
    result.grad_norm = finish_step(model, optimizers, tracker, bias_speed)
    result.count_LE = tracker.count_LE
    return result


class CountTracker:
    """Sums expert choices over the micro-batches of a step, layer by layer, padding left out."""

    def __init__(self, model: Transformer) -> None:
        self.num_experts = model.config.n_routed_experts or 0
        self.layers: list[int] = []
        self.count_LE = torch.zeros(0, self.num_experts, dtype=torch.long)

    def add(self, routing: Routing, weight: int = 1) -> None:
        """Count one forward pass; with weight 0 only what layers there are."""
        if routing.layers:
            count_LE = routing.counts_LE(self.num_experts) * weight
            self.count_LE = count_LE if not self.layers else self.count_LE + count_LE
            self.layers = routing.layers


def finish_step(model: Transformer, optimizers: OptimizerSet, tracker: CountTracker, bias_speed: float) -> float | None:
    """Clip and update, then move the balance biases (also when the gradients were thrown away: the load was real)."""
    norm = optimizers.step()
    if bias_speed:
        update_biases(model, dict(zip(tracker.layers, tracker.count_LE)), bias_speed)
    return norm


def tensors_of(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, labels, documents, positions as int64 tensors."""
    arrays = (batch.token_BS, batch.label_BS, batch.document_BS, batch.position_BS)
    return tuple(torch.from_numpy(np.array(array)).to(device) for array in arrays)  # type: ignore[return-value]
