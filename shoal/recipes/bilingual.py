"""Worked solutions in two languages and in mixtures of both: what makes a language reward mean something.

R1-Zero mixed languages in its thinking because its base had read several (R1 §2.2.4). Here the base reads worked
stories in English, in Chinese, and with every line in either, so a model taught by accuracy alone has no reason to
choose, and one that is also rewarded for keeping to English has.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from shoal.errors import ConfigError
from shoal.recipes.problem_corpus import Document
from shoal.rl.tasks.chain_sum import GAINS, LOSSES

CHINESE = dict(
    zip(
        ("has", *GAINS, *LOSSES),
        ("有", "找到", "买了", "得到", "赢得", "做了", "摘了", "丢了", "卖了", "给了", "掉了", "打碎", "吃了"),
        strict=True,
    )
)
"""The verbs of `chain_sum`'s worked solutions."""


@dataclass(frozen=True, kw_only=True)
class LanguageShares:
    """How worked solutions are written; the rest is English."""

    chinese: float = 0.25
    mixed: float = 0.35

    def __post_init__(self) -> None:
        if min(self.chinese, self.mixed) < 0 or self.chinese + self.mixed > 1:
            raise ConfigError(
                f"chinese={self.chinese} and mixed={self.mixed} must not be negative and reach at most 1."
            )


def in_two_languages(documents: Iterable[Document], shares: LanguageShares, seed: int) -> Iterator[Document]:
    """The documents with the thinking of some in Chinese and of some in both; everything else stays."""
    rng = random.Random(f"languages-{seed}")
    for document in documents:
        chinese_share = _draw(shares, rng)
        yield replace(document, response=translate(document.response, chinese_share, rng))


def translate(response: str, chinese_share: float, rng: random.Random) -> str:
    """Turn that share of the thinking's lines to Chinese; the answer stays."""
    head, opened, rest = response.partition("<think>")
    thinking, closed, tail = rest.partition("</think>")
    if not closed:
        return response
    lines = [_to_chinese(line) if rng.random() < chinese_share else line for line in thinking.split("\n")]
    return head + opened + "\n".join(lines) + closed + tail


def _draw(shares: LanguageShares, rng: random.Random) -> float:
    kind = rng.random()
    if kind < shares.chinese:
        return 1.0
    return 0.5 if kind < shares.chinese + shares.mixed else 0.0


def _to_chinese(line: str) -> str:
    verb, space, rest = line.partition(" ")
    return CHINESE.get(verb, verb) + space + rest
