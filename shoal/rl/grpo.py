"""Group-relative policy optimisation: R1-Zero as a loop.

A step samples `group_size` answers to each of `prompts_per_step` questions, scores them by rule, compares each answer with
its own group (no critic), and moves the policy towards what scored above the group's mean (DeepSeekMath §4.1, R1 §2.2).
Nothing in the loop has ever seen a worked solution for these questions: reward is all it learns from.

Published R1-Zero: 32 questions x 16 answers, temperature 1, learning rate 3e-6, KL 0.001 to a reference refreshed every
400 steps, clip 10. Differs from the paper: models a million times smaller want a rate about a hundred times larger.
"""

import copy
import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shoal.device import peak_memory_bytes
from shoal.engine.engine import Engine
from shoal.errors import ConfigError
from shoal.log import MetricsWriter, duration, progress_bar, say
from shoal.model.layers import compute_dtype, set_compute_dtype
from shoal.model.transformer import Transformer
from shoal.rl.advantage import group_advantages, informative_fraction, rloo_advantages
from shoal.rl.objective import ObjectiveConfig
from shoal.rl.rewards import Reward, accuracy_reward, check_reward_output, format_reward
from shoal.rl.rollout import Prompter, Rollouts, sample_rollouts
from shoal.rl.tasks.answers import parse_response
from shoal.rl.tasks.task import Problem
from shoal.rl.update import UpdateResult, update_policy
from shoal.training.optimizer import OptimizerConfig, OptimizerSet
from shoal.training.schedule import Schedule
from shoal.training.state import extra_tensors, restore_training_state, save_training_state


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """One reinforcement-learning stage."""

    steps: int = 60
    prompts_per_step: int = 32
    group_size: int = 16
    minibatches: int = 1
    """Optimizer steps per rollout; with more than one the ratio leaves 1 and clipping matters."""
    max_response_tokens: int = 80
    temperature: float = 1.0
    reward_weights: tuple[float, float] = (1.0, 0.1)
    """Of accuracy and format. R1-Zero adds them equally; a base that already keeps the format needs less of it."""
    advantage: Literal["std", "none", "rloo"] = "std"
    """Group mean and standard deviation (GRPO), mean only (Dr. GRPO), or leave-one-out."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reference_refresh_steps: int = 400
    """How often the KL reference becomes the current policy; used only with a KL coefficient."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=3e-4, weight_decay=0.0))
    warmup_steps: int = 5
    decay_fraction: float = 0.0
    """Share of the steps, at the end, in which the rate falls linearly to a tenth; 0 keeps it, as published."""
    bias_speed: float = 1e-3
    mtp_weight: float = 0.1
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    row_tokens: int = 256
    micro_batch_answers: int = 512
    seed: int = 0
    log_every: int = 1
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigError(
                f"group_size={self.group_size} leaves nothing to compare an answer with; use at least 2, published 16."
            )
        if (
            min(self.steps, self.prompts_per_step, self.minibatches, self.max_response_tokens, self.checkpoint_every)
            < 1
        ):
            raise ConfigError(
                "steps, prompts_per_step, minibatches, max_response_tokens and checkpoint_every must be at least 1."
            )
        if self.prompts_per_step % self.minibatches:
            raise ConfigError(
                f"prompts_per_step={self.prompts_per_step} does not split into minibatches={self.minibatches} equal parts."
            )
        if not 0 < self.temperature <= 10:
            raise ConfigError(
                f"temperature={self.temperature} must be above 0 (greedy groups are all alike) and at most 10."
            )


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
    reward: Reward | None = None,
    after_step: Callable[[int], None] | None = None,
) -> GrpoResult:
    """Improve `model` on `problems` by reward alone, from the stage's newest checkpoint when there is one.

    Args:
        problems: training problems, drawn without replacement in a seeded order, again when used up.
        reward: replaces the accuracy reward (a control, or a user's own); the format reward stays as weighted.
    Raises:
        CheckpointError: the run directory holds a checkpoint of another configuration.
        TaskError: a reward breaks its contract.
    """
    return _Grpo(model, config, problems, prompter, run_dir, stage, reward or accuracy_reward, after_step).run()


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
        reward: Reward,
        after_step: Callable[[int], None] | None,
    ) -> None:
        if len(problems) < config.prompts_per_step:
            raise ConfigError(f"{len(problems)} problems are fewer than prompts_per_step={config.prompts_per_step}.")
        self.model, self.config, self.problems, self.prompter, self.stage = model, config, problems, prompter, stage
        self.reward, self.after_step = reward, after_step
        self.optimizers = OptimizerSet(model, config.optimizer)
        self.schedule = _schedule(config)
        self.engine = Engine(model, max_rows=max(config.prompts_per_step * config.group_size, 1))
        self.reference = copy.deepcopy(model) if config.objective.kl_coefficient > 0 else None
        self.checkpoint_dir = run_dir / "checkpoints" / stage
        self.metrics = MetricsWriter(run_dir / "metrics.jsonl")
        self.step_done = 0
        self.first_accuracy: float | None = None
        self.last_accuracy: float | None = None
        self.identity = json.loads(json.dumps({"model": model.config.to_dict(), "grpo": dataclasses.asdict(config)}))

    def run(self) -> GrpoResult:
        """Sample, score, update, until all steps are done."""
        device = self.model.embed_tokens.weight.device
        set_compute_dtype(self.model, compute_dtype(self.config.precision, device))
        torch.manual_seed(self.config.seed)
        self._resume()
        started_s, first_step = time.monotonic(), self.step_done
        with progress_bar(self.stage, self.config.steps) as bar:
            bar.advance(self.step_done)
            while self.step_done < self.config.steps:
                note = self._one_step()
                bar.advance(1, note)
                if self.step_done - first_step == 2:
                    left_s = (time.monotonic() - started_s) / 2 * (self.config.steps - self.step_done)
                    say(
                        f"{self.stage}: {self.config.steps} steps, about {duration(left_s)} to go (longer as answers grow)"
                    )
        self.model.eval()
        return GrpoResult(
            steps=self.step_done,
            wall_s=time.monotonic() - started_s,
            first_accuracy=self.first_accuracy,
            last_accuracy=self.last_accuracy,
        )

    def _one_step(self) -> str:
        step, config = self.step_done, self.config
        self.optimizers.set_rate(self.schedule.multiplier(step))
        if self.reference is not None and step % config.reference_refresh_steps == 0:
            self.reference.load_state_dict(self.model.state_dict())
        rollouts = sample_rollouts(
            self.engine,
            self.prompter,
            problems_of_step(self.problems, step, config.prompts_per_step, config.seed),
            group_size=config.group_size,
            max_tokens=config.max_response_tokens,
            temperature=config.temperature,
            seed=config.seed * 7_368_787 + step,
        )
        scores = self._score(rollouts)
        started_s = time.monotonic()
        updates = [self._update(rollouts, scores, part) for part in range(config.minibatches)]
        self.step_done += 1
        accuracy = sum(scores.right) / len(scores.right)
        self.first_accuracy = accuracy if self.first_accuracy is None else self.first_accuracy
        self.last_accuracy = accuracy
        if self.step_done % config.log_every == 0 or self.step_done == config.steps:
            self._write_metrics(rollouts, scores, updates, time.monotonic() - started_s)
        if self.step_done % config.checkpoint_every == 0 or self.step_done == config.steps:
            self._save()
        if self.after_step:
            self.after_step(self.step_done)
        return f"accuracy {accuracy:.2f} length {rollouts.num_response_tokens / len(rollouts.texts):.0f}"

    def _score(self, rollouts: Rollouts) -> "_Scores":
        columns: dict[str, Any] = {"problem": rollouts.problems}
        prompts = [problem.prompt for problem in rollouts.problems]
        ids = [completion.token_ids for completion in rollouts.completions]
        parts = []
        for function in (self.reward, format_reward, accuracy_reward):
            values = function(prompts, rollouts.texts, ids, **columns)
            parts.append(check_reward_output(values, len(prompts), name=getattr(function, "__name__", "reward")))
        rewards, formats, truths = ([value or 0.0 for value in part] for part in parts)
        accuracy_weight, format_weight = self.config.reward_weights
        total_M = torch.tensor([accuracy_weight * r + format_weight * f for r, f in zip(rewards, formats)])
        return _Scores(total_M=total_M, right=[truth == 1.0 for truth in truths], formats=formats)

    def _update(self, rollouts: Rollouts, scores: "_Scores", part: int) -> UpdateResult:
        config = self.config
        size = len(rollouts.texts) // config.minibatches
        window = slice(part * size, (part + 1) * size)
        piece = Rollouts(
            problems=rollouts.problems[window],
            group_size=rollouts.group_size,
            prompt_ids=rollouts.prompt_ids[window],
            completions=rollouts.completions[window],
            texts=rollouts.texts[window],
            wall_s=rollouts.wall_s,
        )
        self.model.train()
        result = update_policy(
            self.model,
            self.optimizers,
            piece,
            self._advantages(scores.total_M[window]),
            scores.right[window],
            config.objective,
            row_tokens=config.row_tokens,
            micro_batch_answers=config.micro_batch_answers,
            temperature=config.temperature,
            bias_speed=config.bias_speed,
            mtp_weight=config.mtp_weight,
            reference=self.reference,
        )
        self.model.eval()
        return result

    def _advantages(self, reward_M: Tensor) -> Tensor:
        if self.config.advantage == "rloo":
            return rloo_advantages(reward_M, self.config.group_size)
        return group_advantages(reward_M, self.config.group_size, scale=self.config.advantage)

    def _write_metrics(
        self, rollouts: Rollouts, scores: "_Scores", updates: list[UpdateResult], update_s: float
    ) -> None:
        lengths = [len(completion.token_ids) for completion in rollouts.completions]
        last = updates[-1]
        self.metrics.write(
            self.stage,
            self.step_done,
            reward=float(scores.total_M.mean()),
            accuracy=_mean(scores.right),
            format=_mean(scores.formats),
            response_tokens=_mean(lengths),
            response_tokens_right=_mean([n for n, right in zip(lengths, scores.right) if right]),
            response_tokens_wrong=_mean([n for n, right in zip(lengths, scores.right) if not right]),
            truncated=_mean([completion.finish_reason == "length" for completion in rollouts.completions]),
            worked_fraction=_mean([shows_work(text) for text in rollouts.texts]),
            informative_groups=informative_fraction(scores.total_M, rollouts.group_size),
            entropy=last.entropy,
            clip_fraction=last.clip_fraction,
            kl=last.kl,
            mismatch=updates[0].mismatch,
            grad_norm=last.grad_norm,
            max_vio=last.max_violation,
            rollout_s=rollouts.wall_s,
            update_s=update_s,
            rollout_tokens_per_s=rollouts.num_response_tokens / max(rollouts.wall_s, 1e-9),
            peak_memory_bytes=peak_memory_bytes(),
        )

    def _save(self) -> None:
        reference = {} if self.reference is None else dict(self.reference.state_dict())
        save_training_state(
            self.checkpoint_dir,
            self.step_done,
            self.model,
            self.optimizers,
            identity=self.identity,
            extra={"accuracies": [self.first_accuracy, self.last_accuracy]},
            extra_tensors=reference,
        )

    def _resume(self) -> None:
        found = restore_training_state(self.checkpoint_dir, self.model, self.optimizers, identity=self.identity)
        if found is None:
            return
        if self.reference is not None:
            self.reference.load_state_dict(extra_tensors(found))
        self.first_accuracy, self.last_accuracy = found.state["extra"]["accuracies"]
        self.step_done = found.step
        self.metrics.rewind(self.stage, self.step_done)
        if self.step_done < self.config.steps:
            say(f"{self.stage}: resuming after step {self.step_done} of {self.config.steps}")


@dataclass
class _Scores:
    total_M: Tensor
    right: list[bool]
    formats: list[float]


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


def problems_of_step(problems: Sequence[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """The questions of one step: a walk through seeded shuffles, so that a resumed run asks what it would have asked."""
    per_pass = len(problems) // count
    order = list(range(len(problems)))
    random.Random(f"{seed}-{step // per_pass}").shuffle(order)
    start = step % per_pass * count
    return [problems[index] for index in order[start : start + count]]


def shows_work(text: str) -> bool:
    """Whether an answer reasons before answering: a think block with something in it."""
    parsed = parse_response(text)
    return parsed is not None and bool(parsed.thinking.strip())


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
