"""The remainder of a number in binary: read from the left, each bit doubles what is left so far and adds itself. Difficulty is
the number of bits.

A plain automaton of eleven states; at a glance one has to know what each place is worth, counted from the other end.
"""

import random

from shoal.rl.tasks.answers import parse_integer
from shoal.rl.tasks.task import Problem

DIVISOR = 11


class Remainder:
    """A binary number, modulo eleven."""

    name = "remainder"
    description = "the remainder of a binary number, modulo 11."
    difficulties = range(4, 33)
    default_difficulty = 12
    constant_answer_bound = 0.20

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """A number of exactly `difficulty` bits."""
        bits = "1" + "".join(rng.choice("01") for _ in range(difficulty - 1))
        return Problem(
            family=self.name,
            difficulty=difficulty,
            prompt=f"What is binary {' '.join(bits)}, modulo {DIVISOR}?",
            answer=str(int(bits, 2) % DIVISOR),
            facts={"bits": bits},
        )

    def verify(self, problem: Problem, answer: str) -> bool:
        """The exact remainder."""
        return parse_integer(answer) == parse_integer(problem.answer)

    def worked(self, problem: Problem) -> str:
        """The remainder of what has been read, after every bit."""
        rest, parts = 0, []
        for bit in list(problem.facts["bits"]):
            rest = (2 * rest + int(bit)) % DIVISOR
            parts.append(f"{bit}:{rest}")
        return " ".join(parts)

    def key(self, problem: Problem) -> str:
        """The bits."""
        return f"{self.name}:{problem.facts['bits']}"
