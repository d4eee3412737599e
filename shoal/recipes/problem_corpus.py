"""The text a small base model reads before reinforcement learning: problems with answers, a few of them worked out.

Every document is true. Most problems are answered at once; a small share (`worked_share`) shows the work first. That is
the situation R1-Zero starts from in miniature: V3-Base's corpus, too, held reasoning traces among much more text that had
none (R1 supplement A.1). Beside problems there are plain lines of arithmetic, as any corpus has. Problems come from the
"pretrain" split alone, so that what reinforcement learning asks was never read.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from shoal.errors import ConfigError
from shoal.rl.tasks import TASKS, Problem, Task
from shoal.rl.tasks.answers import parse_response
from shoal.rl.tasks.splits import split_of


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What the corpus is made of."""

    family: str = "chain_sum"
    difficulty: int = 6
    easier_share: float = 0.3
    """Share of problems that are easier than `difficulty`."""
    worked_share: float = 0.2
    """Share of problems that show their work; 0 is the control without worked solutions."""
    arithmetic_share: float = 0.15
    """Share of documents that are plain lines of sums."""
    history_share: float = 0.0
    """Share of the problems that are asked as the second question of a conversation."""
    documents: int = 60_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in TASKS:
            raise ConfigError(f"family={self.family!r} is unknown; known: {', '.join(sorted(TASKS))}.")
        for name in ("easier_share", "worked_share", "arithmetic_share", "history_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document: a question with its response, or (question None) plain text."""

    question: str | None
    response: str
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns of the conversation: questions with the answers as a client sends them back."""


def write_corpus(config: CorpusConfig) -> Iterator[Document]:
    """The documents, the same for the same config."""
    rng = random.Random(f"corpus-{config.seed}")
    task = TASKS[config.family]
    for _ in range(config.documents):
        if rng.random() < config.arithmetic_share:
            yield Document(question=None, response=arithmetic_lines(rng))
            continue
        document = _answered_problem(task, config, rng)
        asked_before = config.history_share > 0 and rng.random() < config.history_share
        yield replace(document, history=(told(_answered_problem(task, config, rng)),)) if asked_before else document


def told(document: Document) -> tuple[str, str]:
    """A turn as a client sends it back: no thinking, no tags."""
    parsed = parse_response(document.response)
    return document.question or "", parsed.answer if parsed else document.response.partition("</think>")[2]


def respond(task: Task, problem: Problem, *, worked: bool) -> str:
    """A right response in the required format."""
    return in_format(task.worked(problem) if worked else "", problem.answer)


def in_format(thinking: str, answer: str) -> str:
    """A response as the format reward wants it."""
    return f"<think>{thinking}</think><answer>{answer}</answer>"


def arithmetic_lines(rng: random.Random) -> str:
    """A few unrelated true equations."""
    lines = []
    for _ in range(rng.randint(2, 5)):
        left, right = rng.randint(2, 99), rng.randint(2, 9)
        plus = rng.random() < 0.6 or right > left
        lines.append(f"{left}+{right}={left + right}" if plus else f"{left}-{right}={left - right}")
    return "\n".join(lines)


def _answered_problem(task: Task, config: CorpusConfig, rng: random.Random) -> Document:
    easier = range(task.difficulties.start, config.difficulty)
    difficulty = rng.choice(easier) if easier and rng.random() < config.easier_share else config.difficulty
    while True:
        problem = task.generate(rng, difficulty)
        if split_of(task.key(problem)) == "pretrain":
            break
    return Document(question=problem.prompt, response=respond(task, problem, worked=rng.random() < config.worked_share))
