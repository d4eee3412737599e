"""Products of whole numbers, distributed over the digits of the second. Difficulty is the number of digits of each."""

import random

from shoal.rl.tasks.answers import parse_integer
from shoal.rl.tasks.task import Problem


class Multiplication:
    """Two numbers of `difficulty` digits."""

    name = "multiplication"
    description = "products of whole numbers."
    difficulties = range(1, 5)
    default_difficulty = 2
    constant_answer_bound = 0.05

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """Factors of at least 2."""
        low, high = max(2, 10 ** (difficulty - 1)), 10**difficulty - 1
        first, second = rng.randint(low, high), rng.randint(low, high)
        facts = {"first": first, "second": second}
        prompt = f"What is {first} * {second}?"
        return Problem(family=self.name, difficulty=difficulty, prompt=prompt, answer=str(first * second), facts=facts)

    def verify(self, problem: Problem, answer: str) -> bool:
        """The exact number."""
        return parse_integer(answer) == parse_integer(problem.answer)

    def worked(self, problem: Problem) -> str:
        """One product per place of the second factor, then their running sum."""
        first, second = int(problem.facts["first"]), int(problem.facts["second"])
        parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(second))) if digit != "0"]
        lines = [f"{first}*{part}={first * part}" for part in parts]
        total = first * parts[0]
        for part in parts[1:]:
            lines.append(f"{total}+{first * part}={total + first * part}")
            total += first * part
        return "\n".join(lines)

    def key(self, problem: Problem) -> str:
        """Once in both orders."""
        return f"{self.name}:{sorted([int(problem.facts['first']), int(problem.facts['second'])])}"
