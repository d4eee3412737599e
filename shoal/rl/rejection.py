"""Rejection sampling: many answers to each problem, the good ones kept as examples for supervised learning.

R1 uses it twice (§2.3): traces of R1-Zero, filtered for readability, are the cold start; right answers of the
intermediate model become most of the second fine-tuning set, which also is what its distilled models learn from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.engine.engine import Engine
from shoal.rl.grading import FamilyVerifier, Verifier, grade_answers
from shoal.rl.rollout import Prompter, sample_rollouts
from shoal.rl.tasks.task import Problem

PROBLEMS_PER_PASS = 256


@dataclass(frozen=True, kw_only=True)
class KeptAnswer:
    """An answer that is worth learning from."""

    problem: Problem
    text: str


@dataclass(frozen=True, kw_only=True)
class RejectionCounts:
    """What became of the samples."""

    sampled: int
    right: int
    readable: int
    """Right, and accepted by the filter."""
    kept: int
    """Readable, different, and within the limit per problem."""

    def __str__(self) -> str:
        return f"{self.sampled} sampled, {self.right} right, {self.readable} readable, {self.kept} kept"


def rejection_sample(
    engine: Engine,
    prompter: Prompter,
    problems: Sequence[Problem],
    *,
    samples_per_problem: int,
    keep_per_problem: int,
    is_readable: Callable[[str], bool],
    max_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    verifier: Verifier | None = None,
) -> tuple[list[KeptAnswer], RejectionCounts]:
    """Right, readable and different answers, at most `keep_per_problem` of each problem, in the order they were drawn.

    Args:
        is_readable: decides on whole responses that are right.
    """
    kept: list[KeptAnswer] = []
    sampled = right = readable = 0
    for start in range(0, len(problems), PROBLEMS_PER_PASS):
        part = problems[start : start + PROBLEMS_PER_PASS]
        rollouts = sample_rollouts(
            engine,
            prompter,
            part,
            group_size=samples_per_problem,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed + start,
        )
        is_right = grade_answers(verifier or FamilyVerifier(), rollouts.problems, rollouts.texts).right
        sampled, right = sampled + len(is_right), right + sum(is_right)
        for index, problem in enumerate(part):
            mine = slice(index * samples_per_problem, (index + 1) * samples_per_problem)
            good = [t for t, ok in zip(rollouts.texts[mine], is_right[mine]) if ok and is_readable(t)]
            readable += len(good)
            different = list(dict.fromkeys(good))[:keep_per_problem]
            kept += [KeptAnswer(problem=problem, text=text) for text in different]
    return kept, RejectionCounts(sampled=sampled, right=right, readable=readable, kept=len(kept))


def repeats_itself(text: str, limit: int = 3) -> bool:
    """Whether some line stands in the text `limit` times or more: the usual sign of a chain that went in circles."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return any(lines.count(line) >= limit for line in set(lines))
