"""Why a figure is what it is: its formula, every input with its value and source, down to the assumptions."""

from dataclasses import dataclass

from shoal.planner.plan.figure import Number
from shoal.planner.plan.whole import Plan


@dataclass(frozen=True, kw_only=True)
class Input:
    """Something a formula uses."""

    name: str
    value: Number | str | None
    unit: str
    source: str
    is_assumption: bool
    """True for a number or word that somebody chose, False for a figure that follows from others."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Everything behind one figure."""

    name: str
    label: str
    value: Number | str | None
    unit: str
    low: Number | None
    high: Number | None
    formula: str
    source: str
    note: str
    inputs: tuple[Input, ...]
    """What the formula names, then what those figures rest on; each once."""


def explain(plan: Plan, name: str) -> Explanation:
    """What is behind a figure.

    Raises:
        ConfigError: the plan has none of that name.
    """
    figure = plan.figure(name)
    return Explanation(
        name=name,
        label=figure.label,
        value=figure.value,
        unit=figure.unit,
        low=figure.low,
        high=figure.high,
        formula=figure.formula,
        source=figure.source,
        note=figure.note,
        inputs=tuple(_input(plan, one) for one in all_inputs(plan, name)),
    )


def all_inputs(plan: Plan, name: str) -> list[str]:
    """Names of everything a figure rests on, nearest first."""
    figures, found, left = plan.figures, [], list(plan.figure(name).inputs)
    while left:
        one = left.pop(0)
        if one not in found:
            found.append(one)
            left += figures[one].inputs if one in figures else ()
    return found


def _input(plan: Plan, name: str) -> Input:
    settings = plan.question.settings
    if name in plan.figures:
        figure = plan.figures[name]
        return Input(name=name, value=figure.value, unit=figure.unit, source=figure.source, is_assumption=False)
    if name in settings.words:
        return Input(name=name, value=settings.words[name], unit="", source="a choice", is_assumption=True)
    assumed = settings.numbers[name]
    return Input(name=name, value=assumed.value, unit=assumed.unit, source=assumed.source, is_assumption=True)
