"""Two or more plans side by side: each figure that all can give, and how many times the first one's it is."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import ConfigError
from shoal.planner.plan.figure import Number
from shoal.planner.plan.whole import Plan

MOST_PLANS = 6


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of every plan."""

    name: str
    label: str
    unit: str
    values: tuple[Number | str | None, ...]
    times: tuple[float | None, ...]
    """Over the first plan's; None where one of the two is no number."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Plans by their models' names, and their rows."""

    models: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def compare(plans: Sequence[Plan]) -> Comparison:
    """Lay plans side by side.

    Raises:
        ConfigError: fewer than two, or more than `MOST_PLANS`.
    """
    if not 2 <= len(plans) <= MOST_PLANS:
        raise ConfigError(
            f"{len(plans)} models cannot be compared; name 2 to {MOST_PLANS}, as in --compare v3 llama-3.1-405b."
        )
    names = list(dict.fromkeys(name for plan in plans for name in plan.figures))
    notes = {
        f"{plan.question.model.name}: {figure.note}"
        for plan in plans
        for figure in plan.figures.values()
        if figure.note
    }
    return Comparison(
        models=tuple(plan.question.model.name for plan in plans),
        rows=tuple(_row(plans, name) for name in names),
        notes=tuple(sorted(notes)),
    )


def _row(plans: Sequence[Plan], name: str) -> Row:
    figures = [plan.figures.get(name) for plan in plans]
    known = next(figure for figure in figures if figure is not None)
    values = tuple(None if figure is None else figure.value for figure in figures)
    return Row(
        name=name,
        label=known.label,
        unit=known.unit,
        values=values,
        times=tuple(_times(value, values[0]) for value in values),
    )


def _times(value: Number | str | None, first: Number | str | None) -> float | None:
    if not isinstance(value, int | float) or not isinstance(first, int | float) or not first:
        return None
    return value / first
