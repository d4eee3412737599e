"""The sampling half of a step: groups of answers, judged, and what the engine decided while it drew them.

With dynamic sampling (DAPO §3.2) groups that are all right or all wrong teach nothing and are replaced by others until
the step is full. Everything here depends on the weights, the seed, the step and the place in the walk through the
problems, and on nothing else: the same four give the same sample, which is what resuming rests on.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.engine.request import Completion
from shoal.rl.advantage import informative_groups
from shoal.rl.engine_replay import EngineReplay, replay_engine
from shoal.rl.grading import Grade, GradedAnswers, Verifier, grade_answers
from shoal.rl.grpo_config import GrpoConfig
from shoal.rl.rollout import Prompter, RolloutEngine, Rollouts, sample_rollouts
from shoal.rl.tasks.task import Problem


@dataclass(kw_only=True)
class StepSample:
    """What a step learns from."""

    rollouts: Rollouts
    graded: GradedAnswers
    next_problem: int
    """Where the walk through the problems goes on."""
    groups_sampled: int
    """More than the step's groups where dynamic sampling replaced some."""
    replay: EngineReplay | None = None
    place: list[int] = field(default_factory=list)
    """Of each group, its problem's place in the list of problems."""


class StepSampler:
    """Draws the sample of any step, given weights and a place in the walk."""

    def __init__(self, config: GrpoConfig, problems: Sequence[Problem], prompter: Prompter, verifier: Verifier) -> None:
        self.config, self.problems, self.prompter, self.verifier = config, problems, prompter, verifier

    def draw(self, engine: RolloutEngine, step: int, first_problem: int) -> StepSample:
        """The answers of step `step`, from problem `first_problem` of the walk on."""
        config = self.config
        groups: list[_Group] = []
        sampled, at, wall_s = 0, first_problem, 0.0
        failures: Counter[str] = Counter()
        grading_s = slowest_s = 0.0
        rounds = config.max_sampling_rounds if config.dynamic_sampling else 1
        spare: list[_Group] = []
        for number in range(rounds):
            missing = config.prompts_per_step - len(groups)
            places = problem_places(len(self.problems), at, missing, config.seed)
            rollouts = self._roll(engine, places, step, number)
            graded = grade_answers(self.verifier, rollouts.problems, rollouts.texts)
            at, sampled, wall_s = at + missing, sampled + missing, wall_s + rollouts.wall_s
            failures, grading_s = failures + graded.failures, grading_s + graded.wall_s
            slowest_s = max(slowest_s, graded.slowest_s)
            found = _groups_of(rollouts, graded, places)
            teaches = [True] * missing if not config.dynamic_sampling else _teaches(graded, config.group_size)
            groups += [group for group, kept in zip(found, teaches) if kept]
            spare += [group for group, kept in zip(found, teaches) if not kept]
            if len(groups) == config.prompts_per_step:
                break
        groups += spare[: config.prompts_per_step - len(groups)]
        rollouts = _join(groups, config.group_size, wall_s)
        grades = [grade for group in groups for grade in group.graded]
        return StepSample(
            rollouts=rollouts,
            graded=GradedAnswers(grades=grades, wall_s=grading_s, slowest_s=slowest_s, failures=failures),
            next_problem=at,
            groups_sampled=sampled,
            replay=self._replay(engine, rollouts),
            place=[group.place for group in groups],
        )

    def _roll(self, engine: RolloutEngine, places: Sequence[int], step: int, number: int) -> Rollouts:
        config = self.config
        return sample_rollouts(
            engine,
            self.prompter,
            [self.problems[place] for place in places],
            group_size=config.group_size,
            max_tokens=config.max_response_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=(config.seed * 7_368_787 + step) * 64 + number,
        )

    def _replay(self, engine: RolloutEngine, rollouts: Rollouts) -> EngineReplay | None:
        config = self.config
        if not (config.keep_routing or config.keep_sampling_mask):
            return None
        return replay_engine(
            engine.model,
            rollouts,
            keep_routing=config.keep_routing,
            keep_sampling_mask=config.keep_sampling_mask,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )


def problem_places(num_problems: int, first: int, count: int, seed: int) -> list[int]:
    """Places `first` to `first + count` of an endless walk: all problems in a seeded order, then all in another."""
    places: list[int] = []
    while len(places) < count:
        number, start = divmod(first + len(places), num_problems)
        order = list(range(num_problems))
        random.Random(f"{seed}-{number}").shuffle(order)
        places += order[start : start + count - len(places)]
    return places


@dataclass
class _Group:
    place: int
    problem: Problem
    prompt_ids: tuple[int, ...]
    completions: list[Completion]
    texts: list[str]
    graded: list[Grade]


def _groups_of(rollouts: Rollouts, graded: GradedAnswers, places: Sequence[int]) -> list[_Group]:
    size = rollouts.group_size
    return [
        _Group(
            place,
            rollouts.problems[at],
            rollouts.prompt_ids[at],
            rollouts.completions[at : at + size],
            rollouts.texts[at : at + size],
            graded.grades[at : at + size],
        )
        for place, at in zip(places, range(0, len(rollouts.texts), size))
    ]


def _join(groups: Sequence[_Group], group_size: int, wall_s: float) -> Rollouts:
    return Rollouts(
        problems=[group.problem for group in groups for _ in range(group_size)],
        group_size=group_size,
        prompt_ids=[group.prompt_ids for group in groups for _ in range(group_size)],
        completions=[completion for group in groups for completion in group.completions],
        texts=[text for group in groups for text in group.texts],
        wall_s=wall_s,
    )


def _teaches(graded: GradedAnswers, group_size: int) -> list[bool]:
    score_M, counted_M = score_tensors(graded)
    return informative_groups(score_M, group_size, counted_M=counted_M).tolist()


def score_tensors(graded: GradedAnswers) -> tuple[Tensor, Tensor]:
    """Scores, 0 where the verifier failed, and where it did not."""
    score_M = torch.tensor([0.0 if grade.score is None else grade.score for grade in graded.grades])
    return score_M, torch.tensor([grade.score is not None for grade in graded.grades])
