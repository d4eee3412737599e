"""Who says whether an answer is right, and what happens when they cannot say.

A grade is a score from 0 to 1, or none where the verifier failed: it ran out of time, ran out of memory, crashed, raised,
or returned something that is no score. Such an answer is left out of the update (neither reward nor punishment) and counted
by kind. `unparsed` is the one kind that does have a score: the verifier understood that the answer cannot be read, which
is 0, and says so.

The built-in families are pure, total and quick, so they are asked where the trainer runs. Everything else (a user's file,
math-verify, reasoning-gym) is asked in worker processes that can be killed: `verifier_pool.py`.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from shoal.errors import TaskError
from shoal.rl.tasks import TASKS
from shoal.rl.tasks.answers import parse_response
from shoal.rl.tasks.task import Problem

FailureKind = Literal["timeout", "memory", "crash", "raised", "bad_score", "unparsed"]


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What a verifier said of one answer."""

    score: float | None
    """From 0 to 1; None where the verifier failed."""
    failure: FailureKind | None = None
    detail: str = ""
    """The exception or value behind a failure, shortened."""


@dataclass(kw_only=True)
class GradedAnswers:
    """Grades of a batch, in order, and what they cost."""

    grades: list[Grade]
    wall_s: float
    slowest_s: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def scores(self) -> list[float | None]:
        return [grade.score for grade in self.grades]

    @property
    def right(self) -> list[bool]:
        """Which answers are wholly right."""
        return [grade.score == 1.0 for grade in self.grades]


class Verifier(Protocol):
    """Judges bare answers: the text inside the answer block."""

    def verify(self, problems: Sequence[Problem], answers: Sequence[str]) -> tuple[list[Grade], float]:
        """A grade each, and the longest time that one took in seconds."""


class FamilyVerifier:
    """The built-in families, in this process."""

    def verify(self, problems: Sequence[Problem], answers: Sequence[str]) -> tuple[list[Grade], float]:
        slowest_s, grades = 0.0, []
        for problem, answer in zip(problems, answers):
            started_s = time.perf_counter()
            grades.append(Grade(score=float(TASKS[problem.family].verify(problem, answer))))
            slowest_s = max(slowest_s, time.perf_counter() - started_s)
        return grades, slowest_s


def grade_answers(verifier: Verifier, problems: Sequence[Problem], texts: Sequence[str]) -> GradedAnswers:
    """Grade whole responses; one that is not in the format (`tasks.answers.parse_response`) scores 0 unasked."""
    started_s = time.perf_counter()
    grades = [Grade(score=0.0)] * len(texts)
    parsed = [(place, response) for place, text in enumerate(texts) if (response := parse_response(text)) is not None]
    found, slowest_s = verifier.verify([problems[place] for place, _ in parsed], [one.answer for _, one in parsed])
    for (place, _), grade in zip(parsed, found):
        grades[place] = grade
    failures = Counter(grade.failure for grade in grades if grade.failure)
    return GradedAnswers(
        grades=grades,
        wall_s=time.perf_counter() - started_s,
        slowest_s=slowest_s,
        failures=Counter({str(kind): count for kind, count in failures.items()}),
    )


def stop_if_blind(graded: GradedAnswers, max_failed_fraction: float) -> None:
    """Refuse to learn from what remains when too many answers could not be judged.

    Raises:
        TaskError: names the kinds and the first failure.
    """
    failed = [grade for grade in graded.grades if grade.score is None]
    if len(failed) > max_failed_fraction * len(graded.grades):
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(graded.failures.items()))
        raise TaskError(
            f"the verifier failed on {len(failed)} of {len(graded.grades)} answers ({kinds}; first: "
            f"{failed[0].detail or failed[0].failure}); at most {max_failed_fraction:.0%} may fail. Fix the verifier, "
            "or raise its time or memory limit; 'shoal task check' runs it on known answers."
        )


def columns_of(problems: Sequence[Problem], scores: Sequence[float | None], step: int) -> dict[str, Any]:
    """What rewards are handed beside prompts and completions (see `rewards`)."""
    shared = set(problems[0].facts).intersection(*(problem.facts for problem in problems)) if problems else set()
    own = {"problem", "answer", "family", "difficulty", "right", "step"}
    columns: dict[str, Any] = {name: [problem.facts[name] for problem in problems] for name in sorted(shared - own)}
    return columns | {
        "problem": list(problems),
        "answer": [problem.answer for problem in problems],
        "family": [problem.family for problem in problems],
        "difficulty": [problem.difficulty for problem in problems],
        "right": list(scores),
        "step": step,
    }
