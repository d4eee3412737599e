"""What one run of a foreign template may use, and how much a value or an operation would take of it.

Two rules make the bound hold. Before an operation runs, its operands are measured and its result is estimated where that
can be larger than they are: what would be too large is refused before it exists. And every operation takes from one
`Budget`, which also holds the deadline, so a run lasts at most its deadline and one bounded operation more.
"""

import time
from collections.abc import Callable, Collection, Iterator, Set, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

from shoal.errors import TokenizerError

MAX_RENDER_S = 5.0
MAX_STEPS = 500_000
"""Loop turns, operations and entries of new lists."""
MAX_CREATED_CHARS = 100_000_000
"""Characters of all strings made on the way."""
MAX_VALUE_CHARS = 2_000_000
"""Characters of any one value that is worked on; far above what fits a context."""
MAX_VALUE_ENTRIES = 500_000
MAX_VALUE_DEPTH = 100
MAX_NUMBER_BITS = 4096
MAX_RANGE = 100_000
"""Length of a `range`, and any width or count."""
MAX_RANGE_BOUND = 1 << 31
MAX_SMALL = 16
"""Places to round to, and blanks of a JSON level."""
MAX_NEEDLE_CHARS = 200
"""What text is searched for from its end, or stripped of: Python takes the product of both lengths for that."""
MAX_PATH_PARTS = 32


@dataclass
class Budget:
    """What is left of steps, characters and time."""

    steps: int = field(default_factory=lambda: MAX_STEPS)
    chars: int = field(default_factory=lambda: MAX_CREATED_CHARS)
    deadline_s: float = field(default_factory=lambda: time.monotonic() + MAX_RENDER_S)

    def spend(self, steps: int = 1, chars: int = 0) -> None:
        """Take from the budget.

        Raises:
            TokenizerError: nothing is left, or the time is over.
        """
        self.steps -= steps
        self.chars -= chars
        if self.steps < 0:
            raise too_much(f"more than {MAX_STEPS} steps")
        if self.chars < 0:
            raise too_much(f"more than {MAX_CREATED_CHARS} characters of text on the way")
        if time.monotonic() > self.deadline_s:
            raise too_much(f"more than {MAX_RENDER_S} s")


running: ContextVar[Budget] = ContextVar("running")
"""The budget of the template that runs in this thread or task."""


@dataclass(frozen=True)
class Size:
    """Extent of a value with everything in it, counted as often as it is referred to."""

    entries: int
    chars: int
    depth: int


class Paid:
    """An iterator whose every item is paid for; `chain` of them may stand on top of each other."""

    def __init__(self, source: Iterator[Any], chain: int = 0) -> None:
        self._source, self.chain = source, chain

    def __iter__(self) -> "Paid":
        return self

    def __next__(self) -> Any:
        return created(next(self._source))


def too_much(what: str) -> TokenizerError:
    """The refusal."""
    return TokenizerError(f"the chat template ran past its limits: {what}; use another template.")


def measure(*values: Any) -> Size:
    """The size of all values together, as printing, comparing or hashing them would walk it.

    Raises:
        TokenizerError: larger or deeper than a template may handle.
    """
    entries = chars = deepest = 0
    waiting = [(value, 0) for value in values]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, str):
            chars += len(value)
        elif isinstance(value, int):
            chars += bounded_number(value).bit_length() // 3 + 1
        elif isinstance(value, range):
            entries += len(value)
        elif (inside := _inside(value)) is not None:
            entries += len(inside)
            deepest = max(deepest, depth + 1)
            if entries <= MAX_VALUE_ENTRIES and deepest <= MAX_VALUE_DEPTH:
                waiting += [(entry, depth + 1) for entry in inside]
        if entries > MAX_VALUE_ENTRIES or chars > MAX_VALUE_CHARS or deepest > MAX_VALUE_DEPTH:
            raise too_much(
                f"a value of more than {MAX_VALUE_CHARS} characters, {MAX_VALUE_ENTRIES} entries or {MAX_VALUE_DEPTH} levels"
            )
    return Size(entries, chars, deepest)


def _inside(value: Any) -> Collection[Any] | None:
    """What a container holds; None for anything else."""
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, (list, tuple, Set, ValuesView)) else None


def created(value: Any, steps: int = 1) -> Any:
    """Pay for a new value and hand it on; an iterator pays as it is read."""
    budget = running.get()
    if isinstance(value, str):
        budget.spend(steps, len(value))
    elif isinstance(value, (list, tuple, dict, Namespace)):
        budget.spend(steps + len(_inside(value) or ()))
    else:
        budget.spend(steps)
        if isinstance(value, int):
            bounded_number(value)
        elif isinstance(value, Iterator) and not isinstance(value, (Paid, LoopContext)):
            return Paid(value)
    return value


def chained(result: Iterator[Any], sources: Collection[Any]) -> Iterator[Any]:
    """An iterator over other iterators, in a chain of bounded length: reading and freeing a chain recurses."""
    chain = 1 + max((source.chain for source in sources if isinstance(source, Paid)), default=0)
    if chain > MAX_VALUE_DEPTH:
        raise too_much(f"more than {MAX_VALUE_DEPTH} filters on top of each other")
    return Paid(result, chain)


def settled(value: Any) -> Any:
    """Iterators read into a list, paid for item by item; anything else as it is."""
    return list(Paid(value)) if isinstance(value, Iterator) else value


def bounded_number(number: int) -> int:
    """The number, unless computing with it would take long."""
    if number.bit_length() > MAX_NUMBER_BITS:
        raise too_much(f"a number of more than {MAX_NUMBER_BITS} bits")
    return number


def bounded_range(*bounds: int) -> range:
    """`range` of bounded length, and without the steps that make all hashes collide."""
    values = range(*bounds)
    if len(values) > MAX_RANGE or any(abs(bound) > MAX_RANGE_BOUND for bound in bounds):
        raise too_much(f"a range of more than {MAX_RANGE} numbers, or beyond {MAX_RANGE_BOUND}")
    return values


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse an arithmetic operation whose result would be too large, before it is computed."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        if (operator == "*" and bits + right.bit_length() > MAX_NUMBER_BITS) or (
            operator == "**" and bits * right > MAX_NUMBER_BITS
        ):
            raise too_much(f"a number of more than {MAX_NUMBER_BITS} bits")
    elif operator == "%" and isinstance(left, str):
        check_chars(_percent_chars(left, right))
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                _check_length(value, len(value) * times)
    elif operator == "+":
        if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            _check_length(left, len(left) + len(right))
    else:
        measure(left, right)


def _check_length(value: Any, length: int) -> None:
    if isinstance(value, str):
        check_chars(length)
    elif length > MAX_VALUE_ENTRIES:
        raise too_much(f"a list of more than {MAX_VALUE_ENTRIES} entries")


def check_chars(chars: float) -> None:
    """Refuse to make a text this long."""
    if chars > MAX_VALUE_CHARS:
        raise too_much(f"a text of {chars:.0f} characters; at most {MAX_VALUE_CHARS} are allowed")


def _percent_chars(text: str, values: Any) -> int:
    """Upper bound of the length of `text % values`: widths, precisions, and the values once for every conversion."""
    at, widths, conversions = 0, 0, 0
    while (at := text.find("%", at)) >= 0:
        at = _end_of_key(text, at + 1)
        start = at
        while at < len(text) and text[at] in "#0- +.123456789*hlL":
            at += 1
        flags = text[start:at]
        if "*" in flags:
            raise too_much("a width from a value ('%*d')")
        widths += sum(bounded_width(part) for part in flags.strip("#- +hlL").split(".") if part.strip("#0- +hlL"))
        conversions += 1
        at += 1
    return len(text) + widths + conversions * (measure(values).chars + 1000)


def _end_of_key(text: str, at: int) -> int:
    """Where a conversion goes on after its `(key)`, whose parentheses may nest."""
    if not text.startswith("(", at):
        return at
    depth = 0
    for index in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    return len(text)


def bounded_width(width: Any) -> int:
    """A width or count as a number, written out or not; refused when large."""
    if isinstance(width, str):
        digits = "".join(character for character in width if character.isdigit())
        width = int(digits[:20] or "0")
    if not isinstance(width, int):
        return 0
    if abs(width) > MAX_RANGE:
        raise too_much(f"a width or count above {MAX_RANGE}")
    return abs(width)


# What filters, tests and methods may be asked, by name; parameters are named as Jinja names them. Each returns an upper
# bound of the characters made, or refuses.


def _join(value: Any, d: Any = "", attribute: Any = None) -> int:
    _path(attribute)
    count = len(value) if hasattr(value, "__len__") else 0
    return measure(value).chars + count * (measure(d).chars + 1)


def _replace(s: Any, old: Any, new: Any, count: Any = None) -> int:
    return len(str(s)) + str(s).count(str(old)) * len(str(new))


def _indent(s: Any, width: Any = 4, first: Any = False, blank: Any = False) -> int:
    unit = len(width) if isinstance(width, str) else bounded_width(width)
    return len(str(s)) + (len(str(s).splitlines()) + 1) * unit


def _center(value: Any, width: Any = 80) -> int:
    return bounded_width(width)


def _batch(value: Any, linecount: Any = 0, fill_with: Any = None) -> int:
    return bounded_width(linecount)


def _slice(value: Any, slices: Any = 0, fill_with: Any = None) -> int:
    return bounded_width(slices)


def _round(value: Any, precision: Any = 0, method: Any = "common") -> int:
    if isinstance(precision, int) and abs(precision) > MAX_SMALL:
        raise too_much(f"round to more than {MAX_SMALL} places")
    return _number(value)


def _number(value: Any, num: Any = 1) -> int:
    """Where text would be repeated or formatted instead of computed with."""
    if not (isinstance(value, (int, float)) and isinstance(num, (int, float))):
        raise TokenizerError("the chat template computes with something that is no number; use another template.")
    return 0


def _format(value: Any, *args: Any, **kwargs: Any) -> int:
    return _percent_chars(str(value), kwargs or args)


def _trim(value: Any, chars: Any = None) -> int:
    return _needle(chars)


def _needle(text: Any) -> int:
    if isinstance(text, str) and len(text) > MAX_NEEDLE_CHARS:
        raise too_much(f"a search for more than {MAX_NEEDLE_CHARS} characters from the end of a text")
    return 0


def _by_attribute(value: Any, attribute: Any = None, *_: Any, **__: Any) -> int:
    return _path(attribute)


def _by_named_attribute(value: Any, *_: Any, attribute: Any = None, **__: Any) -> int:
    return _path(attribute)


def _compared(value: Any, case_sensitive: Any = False, attribute: Any = None) -> int:
    return _path(attribute)


def _sort(value: Any, reverse: Any = False, case_sensitive: Any = False, attribute: Any = None) -> int:
    return _path(attribute)


def _path(attribute: Any) -> int:
    """`a.b,c` is looked up part by part for every entry."""
    if isinstance(attribute, str) and attribute.count(".") + attribute.count(",") > MAX_PATH_PARTS:
        raise too_much(f"an attribute of more than {MAX_PATH_PARTS} parts")
    return 0


def json_chars(value: Any, indent: Any = None, separators: Any = None, **_: Any) -> int:
    """Upper bound of the length of a value as JSON."""
    if not (indent is None or (isinstance(indent, int) and indent <= MAX_SMALL)):
        raise too_much(f"tojson with an indent that is no whole number up to {MAX_SMALL}")
    size = measure(value)
    return 6 * size.chars + size.entries * (8 + measure(separators).chars + size.depth * max(0, indent or 0))


ESTIMATES: dict[str, Callable[..., int]] = {
    "batch": _batch,
    "center": _center,
    "divisibleby": _number,
    "even": _number,
    "format": _format,
    "groupby": _by_attribute,
    "indent": _indent,
    "join": _join,
    "map": _by_named_attribute,
    "max": _compared,
    "min": _compared,
    "odd": _number,
    "rejectattr": _by_attribute,
    "replace": _replace,
    "round": _round,
    "selectattr": _by_attribute,
    "slice": _slice,
    "sort": _sort,
    "trim": _trim,
    "unique": _compared,
}
"""By filter or test. What is not listed makes little more than it is given."""


def check_method(text: str, name: str, args: tuple[Any, ...]) -> None:
    """Refuse a call of a string method whose result or search would be too large."""
    if name in ("center", "ljust", "rjust", "zfill"):
        check_chars(sum(bounded_width(value) for value in args if isinstance(value, int)))
    elif name in ("strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"):
        _needle(args[0] if args else None)
    elif name == "replace" and len(args) >= 2:
        check_chars(_replace(text, args[0], args[1]))
    elif name == "join" and args:
        check_chars(_join(args[0], text))
