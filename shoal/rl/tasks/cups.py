"""The shell game: a ball under one of six cups, cups change places, where is the ball? Difficulty is the number of swaps.

Following a state through many changes is what a network of few layers cannot do at a glance and does with ease step by
step: composing permutations is a standard example of work that needs depth (Merrill, Petty and Sabharwal, "The Illusion
of State in State-Space Models", arXiv 2404.08819).
"""

import random

from shoal.rl.tasks.answers import parse_letter
from shoal.rl.tasks.task import Problem

CUPS = "ABCDEF"


class Cups:
    """Where the ball is in the end."""

    name = "cups"
    description = "a ball under one of six cups that change places: where is it?"
    difficulties = range(2, 17)
    default_difficulty = 8
    constant_answer_bound = 0.25

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """A start and `difficulty` random swaps."""
        start = rng.choice(CUPS)
        swaps = tuple("".join(rng.sample(CUPS, 2)) for _ in range(difficulty))
        listed = ", ".join(" and ".join(swap) for swap in swaps)
        return Problem(
            family=self.name,
            difficulty=difficulty,
            prompt=f"The ball is under cup {start}. Swap {listed}. Where is the ball?",
            answer=_follow(start, swaps)[-1],
            facts={"start": start, "swaps": swaps},
        )

    def verify(self, problem: Problem, answer: str) -> bool:
        """The cup's letter."""
        return parse_letter(answer) == problem.answer

    def worked(self, problem: Problem) -> str:
        """Where the ball is after every swap."""
        swaps = problem.facts["swaps"]
        places = _follow(problem.facts["start"], swaps)
        return "\n".join(f"{' and '.join(swap)}: {place}" for swap, place in zip(swaps, places))

    def key(self, problem: Problem) -> str:
        """Start and swaps; a swap is the same both ways round."""
        swaps = ["".join(sorted(swap)) for swap in problem.facts["swaps"]]
        return f"{self.name}:{problem.facts['start']}:{' '.join(swaps)}"


def _follow(place: str, swaps: tuple[str, ...]) -> list[str]:
    """The ball's cup after each swap."""
    places = []
    for swap in swaps:
        place = swap[1 - swap.index(place)] if place in swap else place
        places.append(place)
    return places
