"""Text of many task families at once, for a model that people talk to: every problem worked out, asked in many wordings,
and questions outside the tasks answered in a friendly way.

Problems come from the "pretrain" split alone; reinforcement learning and evaluation ask others.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from shoal.errors import ConfigError
from shoal.recipes.fine_steps import fine_steps
from shoal.recipes.phrasings import rephrase
from shoal.recipes.problem_corpus import Document, arithmetic_lines, in_format, told
from shoal.recipes.small_talk import small_talk
from shoal.rl.tasks import TASKS, Problem
from shoal.rl.tasks.splits import split_of


@dataclass(frozen=True, kw_only=True)
class Share:
    """One family's part in the mixture."""

    family: str
    difficulties: tuple[int, ...]
    weight: float

    def __post_init__(self) -> None:
        if self.family not in TASKS:
            raise ConfigError(f"family={self.family!r} is unknown; known: {', '.join(sorted(TASKS))}.")
        outside = [each for each in self.difficulties if each not in TASKS[self.family].difficulties]
        if outside or not self.difficulties:
            allowed = TASKS[self.family].difficulties
            raise ConfigError(
                f"difficulties {outside} of {self.family} are outside {allowed.start}..{allowed.stop - 1}."
            )


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """What the text is made of."""

    shares: tuple[Share, ...]
    small_talk_share: float = 0.06
    arithmetic_share: float = 0.08
    worked_share: float = 1.0
    history_share: float = 0.15
    """Share of the questions that are asked in the course of a conversation."""
    uneven_share: float = 0.25
    """Share of the sums and products whose second number is shorter than the first."""
    documents: int
    seed: int = 0


def write_mixture(config: MixtureConfig) -> Iterator[Document]:
    """The documents, the same for the same config."""
    rng = random.Random(f"mixture-{config.seed}")
    for _ in range(config.documents):
        if rng.random() < config.arithmetic_share:
            yield Document(question=None, response=arithmetic_lines(rng))
            continue
        document = _turn(config, rng)
        turns = rng.randint(1, 2) if rng.random() < config.history_share else 0
        yield replace(document, history=tuple(told(_turn(config, rng)) for _ in range(turns)))


def _turn(config: MixtureConfig, rng: random.Random) -> Document:
    if rng.random() < config.small_talk_share:
        question, reply = small_talk(rng)
        return Document(question=question, response=f"<think></think>{reply}")
    weights = [share.weight for share in config.shares]
    return _problem(rng.choices(config.shares, weights)[0], config, rng)


def _problem(share: Share, config: MixtureConfig, rng: random.Random) -> Document:
    task, difficulty = TASKS[share.family], rng.choice(share.difficulties)
    uneven = rng.random() < config.uneven_share
    while True:
        problem = task.generate(rng, difficulty)
        if uneven and "second" in problem.facts and difficulty > 1:
            problem = _shortened(problem, rng)
        if split_of(task.key(problem)) == "pretrain":
            break
    work, answer = fine_steps(task, problem) if rng.random() < config.worked_share else ("", problem.answer)
    return Document(question=rephrase(problem, rng), response=in_format(work, answer))


def _shortened(problem: Problem, rng: random.Random) -> Problem:
    """The second number cut to fewer digits, as people ask: the families' own problems have two of the same length."""
    first, sign = problem.facts["first"], problem.facts.get("sign", "*")
    second = max(2, problem.facts["second"] // 10 ** rng.randint(1, problem.difficulty - 1))
    answer = {"+": first + second, "-": first - second, "*": first * second}[sign]
    prompt, facts = f"What is {first} {sign} {second}?", {**problem.facts, "second": second}
    return replace(problem, prompt=prompt, answer=str(answer), facts=facts)
