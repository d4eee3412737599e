"""Does the model check itself, and are its checks any good?

Worked answers of some families write their tries down and say of each whether it fits: `3*7-4=17 no`. Such lines can be
judged: the value may be wrong, and the verdict may be. Counting words like "wait" cannot tell checking from decoration;
precision (of the tries called right, how many are) and recall (of the right tries, how many are called so) can.
Any other equation in the thinking is simply true or false; the share of true ones says how well the work is executed.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.rl.tasks.answers import MAX_RESPONSE_CHARS, parse_arithmetic, parse_integer, parse_response

MAX_EQUATIONS = 200
"""Per answer; more than that is repetition."""

_EQUATION = re.compile(r"([0-9+\-*/()]{1,80})=(-?[0-9]{1,12})(?![0-9])(?: (yes|no)\b)?")


@dataclass(kw_only=True)
class CheckCounts:
    """What the checks of a batch of answers came to."""

    equations: int = 0
    true_equations: int = 0
    said_yes: int = 0
    yes_and_right: int = 0
    right_tries: int = 0

    @property
    def precision(self) -> float | None:
        """Of the tries that the model called right, the share that are; None without any."""
        return self.yes_and_right / self.said_yes if self.said_yes else None

    @property
    def recall(self) -> float | None:
        """Of the tries that are right, the share that the model called so; None without any."""
        return self.yes_and_right / self.right_tries if self.right_tries else None

    @property
    def true_fraction(self) -> float | None:
        """Share of the equations that hold; None without any."""
        return self.true_equations / self.equations if self.equations else None


def count_checks(texts: Sequence[str], is_right: Sequence[Callable[[str], bool]]) -> CheckCounts:
    """Read the think blocks of responses.

    Args:
        is_right: of each response's problem, whether a bare answer is right; called only for tries with a verdict.
    """
    counts = CheckCounts()
    for text, judge in zip(texts, is_right):
        parsed = parse_response(text) if len(text) <= MAX_RESPONSE_CHARS else None
        if parsed is None:
            continue
        for number, match in enumerate(_EQUATION.finditer(parsed.thinking)):
            if number == MAX_EQUATIONS:
                break
            _count(counts, match, judge)
    return counts


def _count(counts: CheckCounts, match: "re.Match[str]", judge: Callable[[str], bool]) -> None:
    left, right, verdict = match.groups()
    value, wanted = parse_arithmetic(left), parse_integer(right)
    counts.equations += 1
    counts.true_equations += value is not None and value[0] == wanted
    if verdict is None:
        return
    fits = judge(left)
    counts.right_tries += fits
    counts.said_yes += verdict == "yes"
    counts.yes_and_right += fits and verdict == "yes"
