"""`Figure`: one result of a plan with everything needed to doubt it: unit, formula, inputs, source, and its range."""

from dataclasses import dataclass

Number = int | float


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A result. Its name ends in its unit, as in `training_kwh`; parameters and operations are plain counts."""

    name: str
    label: str
    """For people, without the unit."""
    value: Number | str | None
    """None where it cannot be told; `note` then says why."""
    unit: str
    formula: str
    inputs: tuple[str, ...] = ()
    """Names of settings and of other figures of the same plan."""
    source: str
    """Where the formula, or a number in it, is from."""
    low: Number | None = None
    high: Number | None = None
    """Given where a range is the truth and the value one choice in it."""
    note: str = ""
