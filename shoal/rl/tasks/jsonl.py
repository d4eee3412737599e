"""A dataset as a task: one JSON object a line, GSM8K's layout and its relatives.

A line has a question (`question`, `prompt` or `problem`) and an answer (`answer` or `solution`). GSM8K's answers work the
problem out and end in `#### 72`: what stands before is the worked solution, what stands behind the answer. Numbers are
compared exactly, as fractions, so `1,000`, `1000.0` and `$1000` are one answer and `0.1` is a tenth; other answers by
their words. GSM8K's calculator notes (`<<48/2=24>>`) are taken out of the worked solutions.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.errors import DataError
from shoal.rl.tasks.answers import MAX_ANSWER_CHARS, parse_number
from shoal.rl.tasks.task import Problem

FAMILY = "jsonl"
MAX_LINE_CHARS = 1 << 20

_QUESTION_KEYS, _ANSWER_KEYS = ("question", "prompt", "problem"), ("answer", "solution")
_CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")


def read_problems(path: Path) -> list[Problem]:
    """Every problem of the file, in order; worked solutions stand in `facts["worked"]`.

    Raises:
        DataError: no such file, no problems, or a line without question or answer; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}. Give a UTF-8 file with one JSON object a line.") from error
    found = [_problem(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{path} holds no problems; give one JSON object with 'question' and 'answer' a line.")
    return found


def is_same_answer(gold: str, answer: str) -> bool:
    """Equal as numbers where the right answer is one, otherwise the same words in any case and spacing."""
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    wanted = parse_number(gold)
    if wanted is not None:
        return parse_number(answer) == wanted
    return gold.casefold().split() == answer.casefold().split()


def _problem(line: str, place: str) -> Problem:
    try:
        row = json.loads(line) if len(line) <= MAX_LINE_CHARS else None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is no JSON: {error}.") from error
    if not isinstance(row, dict):
        raise DataError(f"{place} is no JSON object, or longer than {MAX_LINE_CHARS} characters.")
    question, answer = _text(row, _QUESTION_KEYS, place), _text(row, _ANSWER_KEYS, place)
    worked, marker, last = answer.rpartition("####")
    facts = {"worked": _CALCULATOR_NOTE.sub("", worked).strip()} if marker else {}
    gold = (last if marker else answer).strip()
    if not gold:
        raise DataError(f"{place} has an empty answer behind '####'.")
    return Problem(family=FAMILY, difficulty=0, prompt=question, answer=gold, facts=facts)


def _text(row: dict[str, Any], names: Sequence[str], place: str) -> str:
    for name in names:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value.strip():
            return value.strip()
    raise DataError(f"{place} has no text under {' or '.join(repr(name) for name in names)}; it has {sorted(row)[:8]}.")
