"""Refusals that several plans share: counts, fractions and words that cannot be, each named with what is allowed."""

from collections.abc import Iterable

from shoal.errors import ConfigError, did_you_mean


def check_count(name: str, value: int, *, low: int = 1, high: int = 2**50) -> None:
    """Refuse what is no whole number from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        allowed = f"at least {low}" if high == 2**50 else f"from {low} to {high}"
        raise ConfigError(f"{name}={value!r} must be a whole number, {allowed}.")


def check_fraction(name: str, value: float, *, above_zero: bool = False) -> None:
    """Refuse what is no fraction of one."""
    if not 0 <= value <= 1 or (above_zero and value == 0):
        raise ConfigError(
            f"{name}={value} must be {'above 0 and at most' if above_zero else 'from 0 to'} 1; 0.5 is half."
        )


def check_word(name: str, value: str, words: Iterable[str]) -> None:
    """Refuse what is none of `words`."""
    known = tuple(words)
    if value not in known:
        raise ConfigError(f"{name}={value!r} is unknown{did_you_mean(str(value), known)}; use {', '.join(known)}.")
