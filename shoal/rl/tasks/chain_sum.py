"""Word problems that are sums in disguise: "Mia has 37 shells, finds 8, loses 5. How many shells now?"

Direct answers need the whole chain in one glance; written out, every step is easy. That gap between answering and working
is what reinforcement learning can find. Each happening has its own verb, so a worked solution can walk through the story
line by line: `finds 8: 37+8=45`.
"""

import random

from shoal.rl.tasks.answers import parse_integer
from shoal.rl.tasks.task import Problem

NAMES = ("Mia", "Tom", "Ann", "Ben", "Lea", "Max", "Zoe", "Sam", "Eva", "Leo", "Ida", "Jon", "Kim", "Amy", "Dan", "Pia")
THINGS = (
    "apples",
    "shells",
    "coins",
    "books",
    "cards",
    "stamps",
    "beads",
    "pens",
    "marbles",
    "stones",
    "plums",
    "buttons",
)
GAINS = ("finds", "buys", "gets", "wins", "makes", "picks")
LOSSES = ("loses", "sells", "gives", "drops", "breaks", "eats")
SMALLEST, LARGEST = 2, 9
FIRST = (10, 60)


class ChainSum:
    """Running totals of a small story; difficulty is the number of quantities in it."""

    name = "chain_sum"
    description = "short stories of things gained and lost: how many are there now?"
    difficulties = range(2, 8)
    default_difficulty = 6
    constant_answer_bound = 0.08

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """A story whose total never falls below zero."""
        while True:
            start = rng.randint(*FIRST)
            gains, losses = rng.sample(GAINS, len(GAINS)), rng.sample(LOSSES, len(LOSSES))
            total, events = start, []
            for _ in range(difficulty - 1):
                amount = rng.randint(SMALLEST, LARGEST) * (1 if rng.random() < 0.6 else -1)
                total += amount
                verbs = gains if amount > 0 else losses
                if total < 0 or not verbs:
                    break
                events.append((verbs.pop(), amount))
            if len(events) == difficulty - 1:
                break
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        story = ", ".join(f"{verb} {abs(amount)}" for verb, amount in events)
        return Problem(
            family=self.name,
            difficulty=difficulty,
            prompt=f"{name} has {start} {thing}, {story}. How many {thing} now?",
            answer=str(total),
            facts={"start": start, "events": tuple(events)},
        )

    def verify(self, problem: Problem, answer: str) -> bool:
        """The number of things at the end."""
        number = parse_integer(answer)
        return number is not None and number == parse_integer(problem.answer)

    def worked(self, problem: Problem) -> str:
        """One line per happening, with the running total."""
        total = int(problem.facts["start"])
        lines = [f"has {total}"]
        for verb, amount in problem.facts["events"]:
            lines.append(f"{verb} {abs(amount)}: {total}{'+' if amount > 0 else '-'}{abs(amount)}={total + amount}")
            total += amount
        return "\n".join(lines)

    def key(self, problem: Problem) -> str:
        """The amounts in order: names, things and verbs are wording."""
        amounts = [amount for _, amount in problem.facts["events"]]
        return f"{self.name}:{problem.facts['start']}:{amounts}"
