"""Other ways people ask for the same thing, so that a chat model does not hang on one wording.

A problem keeps its answer and its key; only the question is put differently. Families whose question is a puzzle with a
fixed layout (knights, grid paths) are asked as they are.
"""

import random
from collections.abc import Callable

from shoal.rl.tasks import Problem

ARITHMETIC = (
    "What is {sum}?",
    "what is {sum}",
    "What's {sum}?",
    "{sum} = ?",
    "{sum}=",
    "{sum}",
    "Compute {sum}.",
    "Calculate {sum}",
    "How much is {sum}?",
    "Please work out {sum}.",
    "Can you tell me {sum}?",
    "Solve {sum}",
)
SORTING = (
    "Sort {items} from small to large.",
    "Sort {items}",
    "sort {items}",
    "Put {items} in order.",
    "Order {items} from smallest to largest.",
    "Please sort these numbers: {items}",
    "Arrange {items} in ascending order.",
)
STORY_ENDS = (
    "How many {thing} now?",
    "How many {thing} are left?",
    "how many {thing} now?",
    "How many {thing} does {name} have?",
    "How many {thing} in the end?",
)


def rephrase(problem: Problem, rng: random.Random) -> str:
    """The problem's question in one of several wordings, the original among them."""
    wording = _WORDINGS.get(problem.family)
    return wording(problem, rng) if wording else problem.prompt


def _arithmetic(problem: Problem, rng: random.Random) -> str:
    first, sign, second = problem.prompt.removeprefix("What is ").removesuffix("?").split(" ")
    gap = rng.choice((" ", ""))
    words = {"+": "plus", "-": "minus", "*": "times"}
    if rng.random() < 0.15:
        sign, gap = words[sign], " "
    elif sign == "*" and rng.random() < 0.3:
        sign = "x"
    return rng.choice(ARITHMETIC).format(sum=f"{first}{gap}{sign}{gap}{second}")


def _sorting(problem: Problem, rng: random.Random) -> str:
    items = problem.prompt.removeprefix("Sort ").removesuffix(" from small to large.").split(" ")
    return rng.choice(SORTING).format(items=rng.choice((" ", ", ", ",")).join(items))


def _story(problem: Problem, rng: random.Random) -> str:
    story, _, _ = problem.prompt.rpartition(". ")
    name, _, rest = story.partition(" ")
    thing = rest.split(",")[0].split(" ")[2]
    if rng.random() < 0.3:
        head, _, last = story.rpartition(", ")
        story = f"{head} and {last}"
    return f"{story}. {rng.choice(STORY_ENDS).format(thing=thing, name=name)}"


_WORDINGS: dict[str, Callable[[Problem, random.Random], str]] = {
    "addition": _arithmetic,
    "multiplication": _arithmetic,
    "sorting": _sorting,
    "chain_sum": _story,
}
