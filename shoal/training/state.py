"""Everything that decides the next step, saved and brought back: weights, moments, random states, and a stage's own.

Fine-tuning, pretraining and reinforcement learning all resume through here, so "resumed equals uninterrupted" is proved
once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shoal.checkpoint.store import (
    Checkpoint,
    capture_random_state,
    check_same_config,
    flatten_optimizer_state,
    load_latest,
    restore_optimizer_state,
    restore_random_state,
    save_checkpoint,
)
from shoal.model.transformer import Transformer
from shoal.training.optimizer import OptimizerSet


def save_training_state(
    directory: Path,
    step: int,
    model: Transformer,
    optimizers: OptimizerSet,
    *,
    identity: Mapping[str, Any],
    extra: Mapping[str, Any],
    extra_tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint of step `step`; a kill at any moment leaves the one before usable.

    Args:
        identity: the configuration, as JSON values; resuming demands the same.
        extra: the stage's own JSON state; `extra_tensors` its own tensors.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    states = []
    for index, optimizer in enumerate(optimizers.optimizers):
        moments, values = flatten_optimizer_state(optimizer, optimizers.named_parameters)
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        states.append(values)
    random_tensors, random_values = capture_random_state()
    tensors |= {f"random.{name}": tensor for name, tensor in random_tensors.items()}
    tensors |= {f"extra.{name}": tensor for name, tensor in (extra_tensors or {}).items()}
    state = {"identity": dict(identity), "optimizers": states, "random": random_values, "extra": dict(extra)}
    save_checkpoint(directory, step, tensors, state)


def restore_training_state(
    directory: Path, model: Transformer, optimizers: OptimizerSet, *, identity: Mapping[str, Any]
) -> Checkpoint | None:
    """Bring the newest checkpoint back into `model` and `optimizers`; None when there is none.

    The stage finds its own state under `state["extra"]`, its tensors by `extra_tensors`.

    Raises:
        CheckpointError: it belongs to another configuration; the message names what differs.
    """
    found = load_latest(directory)
    if found is None:
        return None
    check_same_config(found.state["identity"], identity)
    model.load_state_dict(_under("model.", found.tensors))
    for index, optimizer in enumerate(optimizers.optimizers):
        moments = _under(f"optimizer.{index}.", found.tensors)
        restore_optimizer_state(optimizer, optimizers.named_parameters, moments, found.state["optimizers"][index])
    restore_random_state(_under("random.", found.tensors), found.state["random"])
    return found


def extra_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The stage's own tensors of a checkpoint."""
    return _under("extra.", checkpoint.tensors)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
