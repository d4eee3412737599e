"""Counting ones: how many ones a bit string has, modulo a small number. Difficulty is the length of the string.

Plain parity has two answers, so a coin scores a half; counting modulo 7 keeps guessing cheap to tell from knowing.
"""

import random

from shoal.rl.tasks.answers import parse_integer
from shoal.rl.tasks.task import Problem

MODULUS = 7


class Parity:
    """The number of ones, modulo seven."""

    name = "parity"
    description = "count the ones in a row of bits, modulo 7."
    difficulties = range(4, 33)
    default_difficulty = 16
    constant_answer_bound = 0.30

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """A random string of `difficulty` bits."""
        bits = "".join(rng.choice("01") for _ in range(difficulty))
        prompt = f"How many ones are in {' '.join(bits)}, modulo {MODULUS}?"
        return Problem(
            family=self.name,
            difficulty=difficulty,
            prompt=prompt,
            answer=str(bits.count("1") % MODULUS),
            facts={"bits": bits},
        )

    def verify(self, problem: Problem, answer: str) -> bool:
        """The exact remainder."""
        return parse_integer(answer) == parse_integer(problem.answer)

    def worked(self, problem: Problem) -> str:
        """The running count after every bit."""
        count, parts = 0, []
        for bit in problem.facts["bits"]:
            count = (count + int(bit)) % MODULUS
            parts.append(f"{bit}:{count}")
        return " ".join(parts)

    def key(self, problem: Problem) -> str:
        """The bits."""
        return f"{self.name}:{problem.facts['bits']}"
