"""Sums and differences of whole numbers, column by column. Difficulty is the number of digits."""

import random

from shoal.rl.tasks.answers import parse_integer
from shoal.rl.tasks.task import Problem


class Addition:
    """Two numbers, plus or minus; the smaller is subtracted from the larger."""

    name = "addition"
    description = "sums and differences of whole numbers."
    difficulties = range(1, 7)
    default_difficulty = 3
    constant_answer_bound = 0.05

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """Both numbers have exactly `difficulty` digits."""
        low, high = 10 ** (difficulty - 1), 10**difficulty - 1
        first, second = rng.randint(low, high), rng.randint(low, high)
        sign = rng.choice("+-")
        if sign == "-" and second > first:
            first, second = second, first
        result = first + second if sign == "+" else first - second
        facts = {"first": first, "second": second, "sign": sign}
        return Problem(
            family=self.name,
            difficulty=difficulty,
            prompt=f"What is {first} {sign} {second}?",
            answer=str(result),
            facts=facts,
        )

    def verify(self, problem: Problem, answer: str) -> bool:
        """The exact number."""
        return parse_integer(answer) == parse_integer(problem.answer)

    def worked(self, problem: Problem) -> str:
        """Place by place from the ones: what is added there, and the total so far."""
        first, second = int(problem.facts["first"]), int(problem.facts["second"])
        direction = 1 if problem.facts["sign"] == "+" else -1
        lines, total = [], first
        for place, digit in enumerate(reversed(str(second))):
            amount = int(digit) * 10**place
            lines.append(f"{total}{'+' if direction > 0 else '-'}{amount}={total + direction * amount}")
            total += direction * amount
        return "\n".join(lines)

    def key(self, problem: Problem) -> str:
        """Sums count once in both orders."""
        pair = [int(problem.facts["first"]), int(problem.facts["second"])]
        pair = sorted(pair) if problem.facts["sign"] == "+" else pair
        return f"{self.name}:{problem.facts['sign']}:{pair}"
