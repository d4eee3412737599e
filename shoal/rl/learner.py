"""Who turns rollouts into moved weights: this process alone, or (`sharded_learner.py`) several under torchrun."""

import copy
from collections.abc import Callable
from typing import Protocol

from shoal.model.transformer import Transformer
from shoal.rl.grpo_config import GrpoConfig
from shoal.rl.update import UpdateBatch, UpdateOptions, UpdateResult, plan_update, update_policy
from shoal.training.optimizer import OptimizerSet


class Learner(Protocol):
    """Holds the optimizer and the reference of a model that others sample from."""

    optimizers: OptimizerSet
    reference: Transformer | None
    """What the divergence is measured from; None without one."""

    def update(self, batch: UpdateBatch) -> UpdateResult:
        """One optimizer step; see `plan_update`. Afterwards the model has the new weights."""

    def refresh_reference(self) -> None:
        """The reference becomes the current policy."""

    def before_saving(self) -> None:
        """Bring all state to where a checkpoint reads it: the model, `optimizers` and `reference`."""

    def after_restoring(self) -> None:
        """Take over what a checkpoint, or a caller, has put there."""


LearnerMaker = Callable[[Transformer, GrpoConfig], Learner]


class LocalLearner:
    """The learner of this process: the model that samples is the one that learns."""

    def __init__(self, model: Transformer, config: GrpoConfig) -> None:
        self.model, self.objective, self.options = model, config.objective, update_options(config)
        self.optimizers = OptimizerSet(model, config.optimizer)
        self.reference = reference_of(model, config)

    def update(self, batch: UpdateBatch) -> UpdateResult:
        """One optimizer step."""
        (micro_batches,) = plan_update(batch, self.objective, self.options, vocab_size=self.model.config.vocab_size)
        return update_policy(
            self.model, self.optimizers, micro_batches, self.objective, self.options, reference=self.reference
        )

    def refresh_reference(self) -> None:
        """Copy the weights."""
        assert self.reference is not None
        self.reference.load_state_dict(self.model.state_dict())

    def before_saving(self) -> None:
        """All state is here."""

    def after_restoring(self) -> None:
        """All state is here."""


def update_options(config: GrpoConfig) -> UpdateOptions:
    """The part of a stage's configuration that says how answers are computed."""
    return UpdateOptions(
        row_tokens=config.row_tokens,
        micro_batch_answers=config.micro_batch_answers,
        temperature=config.temperature,
        bias_speed=config.bias_speed,
        mtp_weight=config.mtp_weight,
    )


def reference_of(model: Transformer, config: GrpoConfig) -> Transformer | None:
    """A copy of the model where the objective measures a divergence."""
    return copy.deepcopy(model) if config.objective.kl_coefficient > 0 else None
