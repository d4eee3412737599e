"""Following arrows: each letter points to another one; where do so many steps lead? Difficulty is the number of steps.

Each step is one look-up, which attention does at once; a chain of them at one glance needs a layer per step or a clever
halving ("pointer chasing"), so direct answers fail where worked ones are easy.
"""

import random

from shoal.rl.tasks.answers import parse_letter
from shoal.rl.tasks.task import Problem

LETTERS = "ABCDEFGHIJ"


class Arrows:
    """Where the arrows lead."""

    name = "arrows"
    description = "letters that point to letters: where do so many steps lead?"
    difficulties = range(2, 10)
    default_difficulty = 5
    constant_answer_bound = 0.20

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """Arrows that form one ring, so that no letter is visited twice, listed in random order."""
        ring = rng.sample(LETTERS, len(LETTERS))
        arrows = dict(zip(ring, [*ring[1:], ring[0]]))
        start = rng.choice(LETTERS)
        listed = ", ".join(f"{letter} to {arrows[letter]}" for letter in rng.sample(LETTERS, len(LETTERS)))
        return Problem(
            family=self.name,
            difficulty=difficulty,
            prompt=f"Arrows: {listed}. From {start}, where do {difficulty} steps lead?",
            answer=_walk(start, arrows, difficulty)[-1],
            facts={"start": start, "arrows": arrows},
        )

    def verify(self, problem: Problem, answer: str) -> bool:
        """The letter at the end."""
        return parse_letter(answer) == problem.answer

    def worked(self, problem: Problem) -> str:
        """The letter after every step."""
        places = _walk(problem.facts["start"], problem.facts["arrows"], problem.difficulty)
        return "\n".join(f"{step}: {place}" for step, place in enumerate(places, start=1))

    def key(self, problem: Problem) -> str:
        """Start, number of steps, and the arrows in the order of the alphabet: the listing is wording."""
        arrows = "".join(target for _, target in sorted(problem.facts["arrows"].items()))
        return f"{self.name}:{problem.facts['start']}:{problem.difficulty}:{arrows}"


def _walk(place: str, arrows: dict[str, str], steps: int) -> list[str]:
    """The letter after each step."""
    places = []
    for _ in range(steps):
        place = arrows[place]
        places.append(place)
    return places
