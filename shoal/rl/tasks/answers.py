"""Small grammars for what models write. Text is parsed, never evaluated, and every parser has a length limit.

The answer format is R1-Zero's: `<think>reasoning</think><answer>answer</answer>`, once each, with nothing but white space
around. Everything here is total: bad text gives None.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_RESPONSE_CHARS = 20_000
MAX_ANSWER_CHARS = 500
MAX_DIGITS = 12
MAX_DEPTH = 20
MAX_NUMBER_CHARS = 40

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_DIGITS = frozenset("0123456789")
_NUMBER = re.compile(r"(-)?[$€£]?([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.([0-9]+))?(?:/([0-9]+))?(%)?")


@dataclass(frozen=True, kw_only=True)
class ParsedResponse:
    """The two parts of a well-formed response."""

    thinking: str
    answer: str


def parse_response(text: str) -> ParsedResponse | None:
    """The think and answer blocks, or None unless the response is exactly one of each in that order."""
    if len(text) > MAX_RESPONSE_CHARS or any(text.count(tag) != 1 for tag in _TAGS):
        return None
    head, _, rest = text.partition("<think>")
    thinking, _, rest = rest.partition("</think>")
    between, _, rest = rest.partition("<answer>")
    answer, closed, tail = rest.partition("</answer>")
    if (
        not closed
        or head.strip()
        or between.strip()
        or tail.strip()
        or any(tag in thinking or tag in answer for tag in _TAGS)
    ):
        return None
    return ParsedResponse(thinking=thinking, answer=answer.strip())


def parse_letter(text: str) -> str | None:
    """One ASCII letter, as a capital."""
    return text.upper() if len(text) == 1 and text.isascii() and text.isalpha() else None


def parse_integer(text: str) -> int | None:
    """A whole number in ASCII digits with an optional minus; no spaces inside, no signs or zeros piled up."""
    body = text[1:] if text.startswith("-") else text
    if not 0 < len(body) <= MAX_DIGITS or not _DIGITS.issuperset(body) or (body[0] == "0" and body != "0"):
        return None
    return int(text)


def parse_number(text: str) -> Fraction | None:
    """A number as people write it, exactly: `-3`, `1,234.50`, `$18`, `3/4`, `50%` (a half), a full stop after it.

    Thousands are grouped by three or not at all; ASCII digits only.
    """
    body = text.strip().removesuffix(".")
    if not 0 < len(body) <= MAX_NUMBER_CHARS:
        return None
    match = _NUMBER.fullmatch(body)
    if match is None:
        return None
    minus, whole, decimals, denominator, percent = match.groups()
    value = Fraction(int(whole.replace(",", "")))
    if denominator is not None:
        if decimals is not None or int(denominator) == 0:
            return None
        value /= int(denominator)
    if decimals:
        value += Fraction(int(decimals), 10 ** len(decimals))
    return (-value if minus else value) / (100 if percent else 1)


def parse_words(text: str) -> list[str] | None:
    """Items separated by commas or spaces, stripped and lower-cased."""
    if len(text) > MAX_ANSWER_CHARS:
        return None
    return [word for word in text.replace(",", " ").lower().split(" ") if word]


def parse_integers(text: str) -> list[int] | None:
    """Whole numbers separated by commas or spaces."""
    words = parse_words(text)
    if not words:
        return None
    numbers = [parse_integer(word) for word in words]
    return None if any(number is None for number in numbers) else [number for number in numbers if number is not None]


def parse_arithmetic(text: str) -> tuple[Fraction, list[int]] | None:
    """Value of an expression of whole numbers, `+ - * /` and parentheses, and the numbers it uses, in order.

    None for anything else: powers, names, division by zero, unbalanced or deep nesting, numbers past `MAX_DIGITS` digits.
    """
    if len(text) > MAX_ANSWER_CHARS:
        return None
    parser = _Arithmetic(text)
    try:
        value = parser.sum(0)
    except _SyntaxProblem:
        return None
    return (value, parser.numbers) if parser.at == len(parser.text) else None


class _SyntaxProblem(Exception):
    """The text is not in the grammar."""


class _Arithmetic:
    """Recursive descent: sum = product {(+|-) product}; product = atom {(*|/) atom}; atom = number | ( sum )."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text.replace(" ", ""), 0
        self.numbers: list[int] = []

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            sign = self.take()
            term = self.product(depth)
            value = value + term if sign == "+" else value - term
        return value

    def product(self, depth: int) -> Fraction:
        value = self.atom(depth)
        while self.peek() in ("*", "/"):
            sign = self.take()
            factor = self.atom(depth)
            if sign == "/" and factor == 0:
                raise _SyntaxProblem
            value = value * factor if sign == "*" else value / factor
        return value

    def atom(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise _SyntaxProblem
        if self.peek() == "(":
            self.take()
            value = self.sum(depth + 1)
            if self.take() != ")":
                raise _SyntaxProblem
            return value
        start = self.at
        while self.peek() in _DIGITS:
            self.at += 1
        number = parse_integer(self.text[start : self.at])
        if number is None:
            raise _SyntaxProblem
        self.numbers.append(number)
        return Fraction(number)

    def peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else "$"

    def take(self) -> str:
        found = self.peek()
        self.at += 1
        return found
