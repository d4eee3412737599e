"""Countdown: reach a target from given numbers, each used exactly once. Difficulty is how many numbers there are."""

import itertools
import random
from collections.abc import Iterator
from fractions import Fraction

from shoal.rl.tasks.answers import parse_arithmetic
from shoal.rl.tasks.task import Problem

LARGEST_TARGET = 200


class Countdown:
    """Any correct expression is right."""

    name = "countdown"
    description = "reach a target number with + - * / from given numbers, each used once."
    difficulties = range(2, 6)
    default_difficulty = 3
    constant_answer_bound = 0.02

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """A problem made from an expression, so a solution exists; the target is a whole number from 1 to 200."""
        while True:
            numbers = [rng.randint(2, 20) for _ in range(difficulty)]
            expression, value = str(numbers[0]), Fraction(numbers[0])
            for number in numbers[1:]:
                sign = rng.choice("+-*")
                expression = (
                    f"({expression}){sign}{number}"
                    if sign == "*" and not expression.isdigit()
                    else f"{expression}{sign}{number}"
                )
                value = {"+": value + number, "-": value - number, "*": value * number}[sign]
            if 1 <= value <= LARGEST_TARGET and value not in numbers:
                break
        shown = rng.sample(numbers, len(numbers))
        listed = ", ".join(str(number) for number in shown)
        return Problem(
            family=self.name,
            difficulty=difficulty,
            prompt=f"Use each of {listed} exactly once with + - * / to make {value}.",
            answer=expression,
            facts={"numbers": tuple(shown), "target": int(value)},
        )

    def verify(self, problem: Problem, answer: str) -> bool:
        """The expression uses exactly the given numbers and has the target's value."""
        parsed = parse_arithmetic(answer)
        return (
            parsed is not None
            and sorted(parsed[1]) == sorted(problem.facts["numbers"])
            and parsed[0] == problem.facts["target"]
        )

    def worked(self, problem: Problem) -> str:
        """Two tries that miss, each checked, then the one that hits."""
        lines = []
        for tried, value in itertools.islice(_tries(problem), 2):
            lines.append(f"{tried}={value} no")
        return "\n".join([*lines, f"{problem.answer}={problem.facts['target']} yes"])

    def key(self, problem: Problem) -> str:
        """Numbers in any order, and the target."""
        return f"{self.name}:{sorted(problem.facts['numbers'])}:{problem.facts['target']}"


def _tries(problem: Problem) -> Iterator[tuple[str, Fraction]]:
    """Left-to-right expressions over the numbers that miss the target."""
    numbers = problem.facts["numbers"]
    for signs in itertools.product("+-", repeat=len(numbers) - 1):
        text = str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in zip(signs, numbers[1:]))
        parsed = parse_arithmetic(text)
        if parsed is not None and parsed[0] != problem.facts["target"]:
            yield text, parsed[0]
