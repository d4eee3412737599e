"""Bytes of a body to a value: strict JSON, and nothing that costs more than its size.

Python's parser takes NaN and infinities, which JSON has not got and which no sampler survives, and it takes integers of
any length, whose conversion is quadratic.
"""

import json
import math
import re
from functools import partial
from typing import Any

from shoal.errors import ShoalError
from shoal.server.limits import RequestLimits

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BodyError(ShoalError):
    """A body that is not the JSON it should be; answered with 400."""


def parse_json(data: bytes, limits: RequestLimits | None = None) -> dict[str, Any]:
    """The object in a body.

    Raises:
        BodyError: not UTF-8, not JSON, nested too deep, or numbers and characters that are none.
    """
    limits = limits or RequestLimits()
    if not data:
        raise BodyError("the body is empty; send a JSON object.")
    too_deep = f"the body is nested deeper than {limits.max_json_depth} levels."
    try:
        text = data.decode("utf-8")
        parse_int = partial(_bounded_int, most=limits.max_json_digits)
        value = json.loads(text, parse_constant=_refuse_constant, parse_int=parse_int, parse_float=_finite_float)
    except UnicodeDecodeError as error:
        raise BodyError(f"the body is not UTF-8 at byte {error.start}.") from None
    except RecursionError:
        raise BodyError(too_deep) from None
    except json.JSONDecodeError as error:
        raise BodyError(f"the body is not valid JSON: {error.msg} at character {error.pos}.") from None
    if _depth_above(value, limits.max_json_depth):
        raise BodyError(too_deep)
    if not isinstance(value, dict):
        raise BodyError("the body must be a JSON object.")
    if _SURROGATE.search(text):
        _refuse_lone_surrogates(value)
    return value


def _refuse_constant(name: str) -> Any:
    raise BodyError(f"the body holds {name}, which is not JSON.")


def _bounded_int(digits: str, most: int) -> int:
    if len(digits) > most:
        raise BodyError(f"the body holds an integer of {len(digits)} digits; at most {most} are taken.")
    return int(digits)


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise BodyError(f"the body holds {digits[:40]}, which is beyond a double's range.")
    return number


def _refuse_lone_surrogates(value: Any) -> None:
    """Half a character, which JSON can spell and UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BodyError(
            "the body holds half of a surrogate pair (\\ud800 to \\udfff); send whole characters."
        ) from None


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
