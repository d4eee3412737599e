"""A dial of seven marks: D doubles what it shows, T turns it by three; what does it show in the end? Difficulty is the number of moves.

The moves do not commute, so counting them is not enough, and the whole must be gone through in order: easy step by step, hard
at a glance.
"""

import random

from shoal.rl.tasks.answers import parse_integer
from shoal.rl.tasks.task import Problem

MARKS = 7
TURN = 3


class Dial:
    """The mark at the end."""

    name = "dial"
    description = "a dial of seven marks that is doubled and turned: what does it show?"
    difficulties = range(4, 33)
    default_difficulty = 12
    constant_answer_bound = 0.25

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """A start and `difficulty` random moves."""
        start, moves = rng.randrange(MARKS), "".join(rng.choice("DT") for _ in range(difficulty))
        return Problem(
            family=self.name,
            difficulty=difficulty,
            prompt=f"A dial shows {start}. Moves: {' '.join(moves)}. What does it show?",
            answer=str(_marks(start, moves)[-1]),
            facts={"start": start, "moves": moves},
        )

    def verify(self, problem: Problem, answer: str) -> bool:
        """The exact mark."""
        return parse_integer(answer) == parse_integer(problem.answer)

    def worked(self, problem: Problem) -> str:
        """What the dial shows after every move."""
        moves = problem.facts["moves"]
        return " ".join(f"{move}:{mark}" for move, mark in zip(moves, _marks(problem.facts["start"], moves)))

    def key(self, problem: Problem) -> str:
        """Start and moves."""
        return f"{self.name}:{problem.facts['start']}:{problem.facts['moves']}"


def _marks(mark: int, moves: str) -> list[int]:
    """What the dial shows after each move."""
    marks = []
    for move in list(moves):
        mark = (2 * mark if move == "D" else mark + TURN) % MARKS
        marks.append(mark)
    return marks
