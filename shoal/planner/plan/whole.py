"""A whole plan: every figure by name, and the parts that charts and tables need."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import ConfigError, did_you_mean
from shoal.planner.plan.cost_of_training import training_figures
from shoal.planner.plan.figure import Figure
from shoal.planner.plan.question import Question
from shoal.planner.plan.sizes import parameters_by_part, size_figures


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What follows from a question, in reading order."""

    question: Question
    sections: Mapping[str, tuple[Figure, ...]] = field(hash=False)

    @property
    def figures(self) -> dict[str, Figure]:
        """All figures by name."""
        return {figure.name: figure for figures in self.sections.values() for figure in figures}

    def figure(self, name: str) -> Figure:
        """One figure.

        Raises:
            ConfigError: there is none of that name in this plan.
        """
        figures = self.figures
        if name not in figures:
            raise ConfigError(
                f"no figure {name[:60]!r} in this plan{did_you_mean(name, figures)}; it has {', '.join(figures)}. Figures of "
                "training need --tokens."
            )
        return figures[name]

    def to_json(self) -> dict[str, Any]:
        """One flat object of figures, with ranges, parts, notes and assumptions beside them."""
        figures = self.figures
        settings = self.question.settings
        return {
            "model": self.question.model.name,
            "hardware": self.question.cluster.name,
            **{name: figure.value for name, figure in figures.items()},
            "units": {name: figure.unit for name, figure in figures.items()},
            "ranges": {name: [one.low, one.high] for name, one in figures.items() if one.low is not None},
            "notes": {name: figure.note for name, figure in figures.items() if figure.note},
            "params_by_part": parameters_by_part(self.question.model),
            "assumptions": {
                key: {"value": one.value, "unit": one.unit, "source": one.source}
                for key, one in settings.numbers.items()
            },
            "choices": dict(settings.words),
        }


def make_plan(question: Question) -> Plan:
    """Answer a question."""
    sections = {
        "Model": tuple(size_figures(question)),
        "Training": tuple(training_figures(question)),
    }
    return Plan(question=question, sections={name: figures for name, figures in sections.items() if figures})
