"""Knights and knaves: knights always tell the truth, knaves always lie; who is who? Difficulty is how many people speak.

Every puzzle has exactly one solution, found by trying all assignments; statements are about one person's kind or about
two people being of the same kind.
"""

import itertools
import random
from collections.abc import Sequence

from shoal.rl.tasks.answers import parse_words
from shoal.rl.tasks.task import Problem

PEOPLE = ("Ann", "Ben", "Cas", "Dot", "Eli", "Fay")
KINDS = ("knave", "knight")

Statement = tuple[int, str, int, int]
"""Speaker, "is" or "same", person, and the claimed kind (is) or the other person (same)."""


class Knights:
    """The answer lists everyone's kind in the order of the puzzle."""

    name = "knights"
    description = "knights tell the truth, knaves lie: who is who?"
    difficulties = range(3, 7)
    default_difficulty = 4
    constant_answer_bound = 0.30

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """Random statements until they leave exactly one assignment."""
        while True:
            statements = [_random_statement(rng, speaker, difficulty) for speaker in range(difficulty)]
            solutions = solve(statements)
            if len(solutions) == 1:
                break
        spoken = " ".join(f"{PEOPLE[statement[0]]} says: {_in_words(statement)}." for statement in statements)
        return Problem(
            family=self.name,
            difficulty=difficulty,
            prompt=f"Knights tell the truth, knaves lie. {spoken} Who is what? List knight or knave for {', '.join(PEOPLE[:difficulty])}.",
            answer=", ".join(KINDS[kind] for kind in solutions[0]),
            facts={"statements": tuple(statements)},
        )

    def verify(self, problem: Problem, answer: str) -> bool:
        """Everyone's kind, in order."""
        return parse_words(answer) == parse_words(problem.answer)

    def worked(self, problem: Problem) -> str:
        """Try assignments in order until none of the statements is contradicted."""
        statements: Sequence[Statement] = problem.facts["statements"]
        lines: list[str] = []
        for kinds in itertools.product((1, 0), repeat=len(statements)):
            named = ", ".join(KINDS[kind] for kind in kinds)
            broken = next((statement for statement in statements if not _fits(statement, kinds)), None)
            if broken is None:
                return "\n".join([*lines, f"{named}: fits"])
            lines.append(f"{named}: {PEOPLE[broken[0]]} does not fit")
        raise AssertionError("a generated puzzle has a solution")

    def key(self, problem: Problem) -> str:
        """The statements."""
        return f"{self.name}:{problem.facts['statements']}"


def solve(statements: Sequence[Statement]) -> list[tuple[int, ...]]:
    """Every assignment (1 knight, 0 knave) under which each statement is true exactly if its speaker is a knight."""
    every = itertools.product((0, 1), repeat=len(statements))
    return [kinds for kinds in every if all(_fits(statement, kinds) for statement in statements)]


def _fits(statement: Statement, kinds: Sequence[int]) -> bool:
    speaker, form, person, other = statement
    is_true = kinds[person] == other if form == "is" else kinds[person] == kinds[other]
    return is_true == bool(kinds[speaker])


def _random_statement(rng: random.Random, speaker: int, people: int) -> Statement:
    others = [person for person in range(people) if person != speaker]
    if len(others) > 1 and rng.random() < 0.5:
        first, second = rng.sample(others, 2)
        return speaker, "same", first, second
    return speaker, "is", rng.choice(others), rng.randrange(2)


def _in_words(statement: Statement) -> str:
    _, form, person, other = statement
    if form == "is":
        return f"{PEOPLE[person]} is a {KINDS[other]}"
    return f"{PEOPLE[person]} and {PEOPLE[other]} are the same kind"
