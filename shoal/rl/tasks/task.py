"""What a task is: questions that can be made without end, and a rule that tells right answers from wrong ones.

The rule is pure, total and quick: it reads text, never runs it, never raises, and takes well under a millisecond. Nothing
about a task knows tokens or models.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question with its answer."""

    family: str
    difficulty: int
    prompt: str
    """What is asked, in plain words."""
    answer: str
    """A right answer in canonical form; others may be right too, the verifier knows."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the verifier needs beside the answer."""


class Task(Protocol):
    """A family of problems with a difficulty dial."""

    name: str
    description: str
    """One line for people."""
    difficulties: range
    default_difficulty: int
    constant_answer_bound: float
    """The best constant answer scores less than this at the default difficulty."""

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """A random problem."""

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` (the text inside the answer block) is right. Pure, total, bounded in input length."""

    def worked(self, problem: Problem) -> str:
        """The reasoning that leads to the answer, as it would stand in a think block."""

    def key(self, problem: Problem) -> str:
        """What makes a problem the same problem, however it is worded or ordered."""
