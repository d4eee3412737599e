"""Sorting numbers. Difficulty is how many there are."""

import random

from shoal.rl.tasks.answers import parse_integers
from shoal.rl.tasks.task import Problem


class Sorting:
    """Different two-digit numbers, smallest first."""

    name = "sorting"
    description = "put numbers in order."
    difficulties = range(2, 13)
    default_difficulty = 5
    constant_answer_bound = 0.02

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """Numbers without repeats, not already in order."""
        numbers = rng.sample(range(10, 100), difficulty)
        while numbers == sorted(numbers):
            rng.shuffle(numbers)
        listed = " ".join(str(number) for number in numbers)
        answer = " ".join(str(number) for number in sorted(numbers))
        facts = {"numbers": tuple(numbers)}
        return Problem(
            family=self.name,
            difficulty=difficulty,
            prompt=f"Sort {listed} from small to large.",
            answer=answer,
            facts=facts,
        )

    def verify(self, problem: Problem, answer: str) -> bool:
        """All numbers, in order; commas or spaces between."""
        return parse_integers(answer) == sorted(problem.facts["numbers"])

    def worked(self, problem: Problem) -> str:
        """Selection: the smallest that is left, and what then remains."""
        left, lines = list(problem.facts["numbers"]), []
        while left:
            smallest = min(left)
            left.remove(smallest)
            lines.append(f"{smallest} leaves {' '.join(str(number) for number in left) or 'none'}")
        return "\n".join(lines)

    def key(self, problem: Problem) -> str:
        """The set of numbers."""
        return f"{self.name}:{sorted(problem.facts['numbers'])}"
