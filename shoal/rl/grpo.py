"""Group-relative policy optimisation: R1-Zero as a loop.

A step samples `group_size` answers to each of `prompts_per_step` questions, scores them by rule, compares each answer with
its own group (no critic), and moves the policy towards what scored above the group's mean (DeepSeekMath §4.1, R1 §2.2).
Nothing in the loop has ever seen a worked solution for these questions: reward is all it learns from.

Published R1-Zero: 32 questions x 16 answers, temperature 1, learning rate 3e-6, KL 0.001 to a reference refreshed every
400 steps, clip 10 (`variants` holds it and its relatives). Differs from the paper: models a million times smaller want a
rate about a hundred times larger.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shoal.errors import ConfigError
from shoal.log import MetricsWriter, duration, progress_bar, say
from shoal.model.layers import compute_dtype, set_compute_dtype
from shoal.model.transformer import Transformer
from shoal.rl.advantage import group_advantages, overlong_penalty, rloo_advantages
from shoal.rl.grading import FamilyVerifier, Verifier, columns_of, stop_if_blind
from shoal.rl.grpo_config import GrpoConfig
from shoal.rl.learner import LearnerMaker, LocalLearner, update_options
from shoal.rl.lookahead import Lookahead
from shoal.rl.rewards import R1_ZERO_REWARDS, RewardTable, WeightedReward, score_answers
from shoal.rl.rollout import EngineMaker, Prompter, engine_here
from shoal.rl.sampling import StepSample, StepSampler
from shoal.rl.step_metrics import step_metrics, write_samples
from shoal.rl.tasks.task import Problem
from shoal.rl.update import UpdateBatch, UpdateResult, policy_log_probabilities
from shoal.training.schedule import Schedule
from shoal.training.state import extra_tensors, restore_training_state, save_training_state

SILENT_STEPS = 10
"""After so many steps without one informative group the run says what is wrong."""


@dataclass(frozen=True, kw_only=True)
class GrpoResult:
    """How a stage ended."""

    steps: int
    wall_s: float
    first_accuracy: float | None
    last_accuracy: float | None


def train_grpo(
    model: Transformer,
    config: GrpoConfig,
    problems: Sequence[Problem],
    prompter: Prompter,
    run_dir: Path,
    *,
    stage: str = "rl",
    rewards: Sequence[WeightedReward] = R1_ZERO_REWARDS,
    verifier: Verifier | None = None,
    engines: EngineMaker = engine_here,
    learners: LearnerMaker = LocalLearner,
    after_step: Callable[[int], None] | None = None,
) -> GrpoResult:
    """Improve `model` on `problems` by reward alone, from the stage's newest checkpoint when there is one.

    Args:
        problems: training problems, drawn without replacement in a seeded order, again when used up.
        rewards: what an answer is worth, added up by weight; default accuracy, and a tenth for the format.
        verifier: who says what is right; default the built-in families.
        engines: who samples; default this process (`ray_rollouts` has workers).
        learners: who updates; default this process (`sharded_learner` has ranks).
    Raises:
        CheckpointError: the run directory holds a checkpoint of another configuration.
        TaskError: a reward breaks its contract, or the verifier fails on too many answers.
    """
    if not rewards:
        raise ConfigError("there is no reward to learn from; give at least one.")
    return _Grpo(
        model,
        config,
        problems,
        prompter,
        run_dir,
        stage,
        rewards,
        verifier or FamilyVerifier(),
        engines,
        learners,
        after_step,
    ).run()


class _Grpo:
    """The state of one running stage."""

    def __init__(
        self,
        model: Transformer,
        config: GrpoConfig,
        problems: Sequence[Problem],
        prompter: Prompter,
        run_dir: Path,
        stage: str,
        rewards: Sequence[WeightedReward],
        verifier: Verifier,
        engines: EngineMaker,
        learners: LearnerMaker,
        after_step: Callable[[int], None] | None,
    ) -> None:
        if len(problems) < config.prompts_per_step:
            raise ConfigError(f"{len(problems)} problems are fewer than prompts_per_step={config.prompts_per_step}.")
        self.model, self.config, self.stage = model, config, stage
        self.rewards, self.after_step = tuple(rewards), after_step
        set_compute_dtype(model, compute_dtype(config.precision, model.embed_tokens.weight.device))
        self.learner = learners(model, config)
        self.schedule = _schedule(config)
        sampler, max_rows = (
            StepSampler(config, problems, prompter, verifier),
            config.prompts_per_step * config.group_size,
        )
        self.lookahead = Lookahead(model, sampler, engines, max_rows, config.staleness)
        self.checkpoint_dir = run_dir / "checkpoints" / stage
        self.metrics = MetricsWriter(run_dir / "metrics.jsonl")
        self.samples = MetricsWriter(run_dir / "samples.jsonl")
        self.step_done = self.silent_steps = 0
        self.first_accuracy: float | None = None
        self.last_accuracy: float | None = None
        settings = {**dataclasses.asdict(config), "rewards": [[reward.title, reward.weight] for reward in rewards]}
        self.identity = json.loads(json.dumps({"model": model.config.to_dict(), "grpo": settings}))

    def run(self) -> GrpoResult:
        """Sample, score, update, until all steps are done."""
        torch.manual_seed(self.config.seed)
        self._resume()
        started_s, first_step = time.monotonic(), self.step_done
        try:
            with progress_bar(self.stage, self.config.steps, done=self.step_done) as bar:
                while self.step_done < self.config.steps:
                    bar.advance(1, self._one_step())
                    if self.step_done - first_step == 2:
                        left_s = (time.monotonic() - started_s) / 2 * (self.config.steps - self.step_done)
                        hint = f"about {duration(left_s)} to go (longer as answers grow)"
                        say(f"{self.stage}: {self.config.steps} steps, {hint}")
        finally:
            self.lookahead.close()
        self.model.eval()
        return GrpoResult(
            steps=self.step_done,
            wall_s=time.monotonic() - started_s,
            first_accuracy=self.first_accuracy,
            last_accuracy=self.last_accuracy,
        )

    def _one_step(self) -> str:
        step, config = self.step_done, self.config
        self.learner.optimizers.set_rate(self.schedule.multiplier(step))
        if self.learner.reference is not None and step % config.reference_refresh_steps == 0:
            self.learner.refresh_reference()
        sample = self.lookahead.take(step)
        stop_if_blind(sample.graded, config.max_failed_fraction)
        table = self._score(sample)
        started_s = time.monotonic()
        updates = self._update(sample, table)
        self.step_done += 1
        right = sample.graded.right
        self.last_accuracy = sum(right) / len(right)
        self.first_accuracy = self.last_accuracy if self.first_accuracy is None else self.first_accuracy
        self._write(sample, table, updates, time.monotonic() - started_s)
        if self.step_done % config.checkpoint_every == 0 or self.step_done == config.steps:
            self._save()
        if self.after_step:
            self.after_step(self.step_done)
        mean_tokens = sample.rollouts.num_response_tokens / len(right)
        return f"accuracy {self.last_accuracy:.2f} length {mean_tokens:.0f}"

    def _score(self, sample: StepSample) -> RewardTable:
        """Rewards of every answer, with the penalty for length where the recipe has one."""
        rollouts, config = sample.rollouts, self.config
        ids = [completion.token_ids for completion in rollouts.completions]
        table = score_answers(
            self.rewards,
            [problem.prompt for problem in rollouts.problems],
            rollouts.texts,
            ids,
            columns_of(rollouts.problems, sample.graded.scores, self.step_done),
            on_error=config.on_reward_error,
        )
        if config.overlong_cache_tokens:
            length_M = torch.tensor([len(tokens) for tokens in ids])
            table.total_M += overlong_penalty(length_M, config.max_response_tokens, config.overlong_cache_tokens)
        return table

    def _update(self, sample: StepSample, table: RewardTable) -> list[UpdateResult]:
        """One optimizer step per minibatch of groups."""
        config, rollouts = self.config, sample.rollouts
        advantage_M = self._advantages(table)
        self.model.train()
        old_logprobs = (
            policy_log_probabilities(self.model, rollouts, update_options(config), replay=sample.replay)
            if config.objective.importance is not None
            else None
        )
        size = len(rollouts.texts) // config.minibatches
        updates = [
            self.learner.update(
                UpdateBatch(
                    rollouts=rollouts,
                    advantage_M=advantage_M,
                    right=sample.graded.right,
                    answers=range(part * size, (part + 1) * size),
                    old_logprobs=old_logprobs,
                    replay=sample.replay,
                )
            )
            for part in range(config.minibatches)
        ]
        self.model.eval()
        return updates

    def _advantages(self, table: RewardTable) -> Tensor:
        reward_M, counted_M, size = table.total_M, table.counted_M, self.config.group_size
        if self.config.advantage == "reward":
            return torch.where(counted_M, reward_M, 0.0)
        if self.config.advantage == "rloo":
            return rloo_advantages(reward_M, size, counted_M=counted_M)
        return group_advantages(reward_M, size, scale=self.config.advantage, counted_M=counted_M)

    def _write(self, sample: StepSample, table: RewardTable, updates: list[UpdateResult], update_s: float) -> None:
        values = step_metrics(sample, table, updates, update_s=update_s)
        self.silent_steps = self.silent_steps + 1 if values["informative_groups"] == 0 else 0
        if self.silent_steps == SILENT_STEPS:
            say(f"{self.stage}: {_silence(values['accuracy'] or 0.0, SILENT_STEPS * len(sample.rollouts.texts))}")
        if self.step_done % self.config.log_every == 0 or self.step_done == self.config.steps:
            self.metrics.write(self.stage, self.step_done, **values)
            write_samples(self.samples, self.stage, self.step_done, sample, table, self.config.samples_per_step)

    def _save(self) -> None:
        self.learner.before_saving()
        waiting, waiting_tensors = self.lookahead.state()
        tensors = {f"waiting.{name}": tensor for name, tensor in waiting_tensors.items()}
        reference = self.learner.reference
        if reference is not None:
            tensors |= {f"reference.{name}": tensor for name, tensor in reference.state_dict().items()}
        extra = {"accuracies": [self.first_accuracy, self.last_accuracy], "silent_steps": self.silent_steps}
        save_training_state(
            self.checkpoint_dir,
            self.step_done,
            self.model,
            self.learner.optimizers,
            identity=self.identity,
            extra={**extra, "sampling": waiting},
            extra_tensors=tensors,
        )

    def _resume(self) -> None:
        found = restore_training_state(self.checkpoint_dir, self.model, self.learner.optimizers, identity=self.identity)
        if found is None:
            self.metrics.rewind(self.stage, 0)
            self.samples.rewind(self.stage, 0)
            return
        tensors, extra = extra_tensors(found), found.state["extra"]
        if self.learner.reference is not None:
            self.learner.reference.load_state_dict(_under("reference.", tensors))
        self.learner.after_restoring()
        self.first_accuracy, self.last_accuracy = extra["accuracies"]
        self.silent_steps = extra["silent_steps"]
        self.lookahead.restore(extra["sampling"], _under("waiting.", tensors))
        self.step_done = found.step
        self.metrics.rewind(self.stage, self.step_done)
        self.samples.rewind(self.stage, self.step_done)
        if self.step_done < self.config.steps:
            say(f"{self.stage}: resuming after step {self.step_done} of {self.config.steps}")


def _silence(accuracy: float, answers: int) -> str:
    """What a run without informative groups should be told."""
    if accuracy > 0.5:
        return (
            f"all groups of {answers} answers were all right: there is nothing left to learn here. Stop, or ask harder "
            "problems (difficulty)."
        )
    return (
        f"no group of the last {answers} answers scored differently within itself, so nothing was learned. The model "
        "never succeeds: ask easier problems, sample larger groups, show more worked solutions to the base, or use a better one."
    )


def _schedule(config: GrpoConfig) -> Schedule:
    warmup = min(config.warmup_steps, int(config.steps * (1 - config.decay_fraction)))
    if not config.decay_fraction:
        return Schedule(kind="constant", warmup_steps=warmup, total_steps=config.steps)
    return Schedule(
        kind="wsd",
        warmup_steps=warmup,
        total_steps=config.steps,
        decay_fraction=config.decay_fraction,
        min_fraction=0.1,
    )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
