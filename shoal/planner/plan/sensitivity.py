"""Which assumptions matter: each is moved alone over its honest range, and the figure's answers are ranked by their span.

Where published sources span a range, that is the range; where nobody knows one, a fifth less and a quarter more stand for it.
An assumption that somebody set is moved by the same fifth and quarter around their number.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from shoal.errors import ConfigError
from shoal.planner.plan.explain import all_inputs
from shoal.planner.plan.settings import SETTINGS, YOURS, Settings
from shoal.planner.plan.whole import Plan, figure_under

DEFAULT_FIGURES = ("training_usd", "usd_per_million_output_tokens", "kv_bytes_per_sequence")
"""What is asked about where nobody names a figure: the first that the plan has."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one assumption does to a figure."""

    key: str
    unit: str
    low: float
    high: float
    """Ends of the assumption's range."""
    at_low: float
    at_high: float
    """The figure there."""
    span_fraction: float
    """How far the two answers lie apart, as a part of the plan's own."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Effects on a figure, largest first."""

    figure: str
    unit: str
    value: float
    effects: tuple[Effect, ...]


def sensitivity(plan: Plan, name: str | None = None) -> Sensitivity:
    """Rank what a figure rests on.

    Args:
        name: None takes the first of `DEFAULT_FIGURES` that the plan has.
    Raises:
        ConfigError: no such figure, or one that is no number.
    """
    chosen = name or next(one for one in DEFAULT_FIGURES if one in plan.figures)
    figure = plan.figure(chosen)
    if not isinstance(figure.value, int | float) or not figure.value:
        raise ConfigError(f"{chosen} is {figure.value!r}, no number that could be moved; name another figure.")
    moved = [one for one in _effects(plan, chosen, float(figure.value)) if one.span_fraction > 1e-9]  # less is rounding
    effects = sorted(moved, key=lambda one: -one.span_fraction)
    return Sensitivity(figure=chosen, unit=figure.unit, value=float(figure.value), effects=tuple(effects))


def _effects(plan: Plan, name: str, value: float) -> Iterator[Effect]:
    settings = plan.question.settings
    for key in all_inputs(plan, name):
        if key not in settings.numbers:
            continue
        low, high = _range(settings, key)
        answers = [_answer(plan, name, settings.changed(key, end)) for end in (low, high)]
        if answers[0] is None or answers[1] is None:
            continue
        yield Effect(
            key=key,
            unit=SETTINGS[key].unit,
            low=low,
            high=high,
            at_low=answers[0],
            at_high=answers[1],
            span_fraction=abs(answers[1] - answers[0]) / abs(value),
        )


def _range(settings: Settings, key: str) -> tuple[float, float]:
    setting, assumed = SETTINGS[key], settings.numbers[key]
    low, high = assumed.value * 0.8, assumed.value * 1.25
    if setting.doubt is not None and assumed.source != YOURS:
        low, high = min(setting.doubt[0], assumed.value), max(setting.doubt[1], assumed.value)
    low, high = max(low, setting.low), min(high, setting.high)
    return (max(1.0, round(low)), round(high)) if setting.is_whole else (low, high)


def _answer(plan: Plan, name: str, settings: Settings) -> float | None:
    figure = figure_under(plan, settings, name)
    return float(figure.value) if figure is not None and isinstance(figure.value, int | float) else None
