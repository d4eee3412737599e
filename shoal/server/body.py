"""Bytes of a body to a value: strict JSON, and nothing that costs more than its size.

Python's parser takes NaN and infinities, which JSON has not got and which no sampler survives, and it takes integers of
any length, whose conversion is quadratic.
"""

import json
from typing import Any

from shoal.errors import ShoalError

MAX_DEPTH = 64
MAX_DIGITS = 40


class BodyError(ShoalError):
    """A body that is not the JSON it should be; answered with 400."""


def parse_json(data: bytes) -> Any:
    """The value of a body.

    Raises:
        BodyError: not UTF-8, not JSON, nested too deep, or numbers that are none.
    """
    if not data:
        raise BodyError("the body is empty; send a JSON object.")
    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, parse_int=_bounded_int)
    except UnicodeDecodeError as error:
        raise BodyError(f"the body is not UTF-8 at byte {error.start}.") from None
    except RecursionError:
        raise BodyError(f"the body is nested deeper than {MAX_DEPTH} levels.") from None
    except json.JSONDecodeError as error:
        raise BodyError(f"the body is not valid JSON: {error.msg} at character {error.pos}.") from None
    if _depth_above(value, MAX_DEPTH):
        raise BodyError(f"the body is nested deeper than {MAX_DEPTH} levels.")
    if not isinstance(value, dict):
        raise BodyError("the body must be a JSON object.")
    return value


def _refuse_constant(name: str) -> Any:
    raise BodyError(f"the body holds {name}, which is not JSON.")


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise BodyError(f"the body holds an integer of {len(digits)} digits; at most {MAX_DIGITS} are taken.")
    return int(digits)


def _depth_above(value: Any, limit: int) -> bool:
    """Level by level, without recursion."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True
