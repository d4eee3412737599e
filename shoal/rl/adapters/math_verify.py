"""math-verify as a judge: answers in LaTeX or plain notation are equal when they mean the same. Runs in a worker only.

math-verify (Apache-2.0) parses with sympy, which evaluates text, and keeps time by SIGALRM. Both are why it lives in a
process that the pool kills; its own time limits are switched off.
"""

from collections.abc import Mapping
from typing import Any

from math_verify import parse
from math_verify import verify as same

name = "math-verify"


def verify(problem: Mapping[str, Any], answer: str) -> bool:
    """Whether `answer` equals the problem's answer.

    Raises:
        ValueError: the answer holds no mathematics.
    """
    gold = _parsed(str(problem["answer"]))
    if not gold:
        raise RuntimeError(f"the right answer {problem['answer']!r} cannot be parsed")
    found = _parsed(answer)
    if not found:
        raise ValueError("no mathematics in the answer")
    return bool(same(gold, found, timeout_seconds=None))


def _parsed(text: str) -> list[Any]:
    wrapped = text if "$" in text or "\\boxed" in text else f"${text}$"
    return list(parse(wrapped, parsing_timeout=None))
