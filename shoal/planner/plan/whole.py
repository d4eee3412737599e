"""A whole plan: every figure by name, and the parts that charts and tables need."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shoal.errors import ConfigError, did_you_mean
from shoal.planner.plan.cost_of_serving import serving_figures
from shoal.planner.plan.cost_of_training import training_figures
from shoal.planner.plan.figure import Figure
from shoal.planner.plan.fitting import Served, Trained, fitting_figures, served, trained
from shoal.planner.plan.question import Question
from shoal.planner.plan.settings import Settings
from shoal.planner.plan.sizes import files_by_format, parameters_by_part, size_figures


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What follows from a question, in reading order."""

    question: Question
    training: Trained | None
    serving: Served | None
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
            "checkpoint_bytes_fp8_by_format": files_by_format(self.question.model),
            "training_memory_bytes_by_part": self.training.memory.by_part() if self.training else {},
            "serving_memory_bytes_by_part": self.serving.memory.by_part() if self.serving else {},
            "assumptions": {
                key: {"value": one.value, "unit": one.unit, "source": one.source}
                for key, one in settings.numbers.items()
            },
            "choices": dict(settings.words),
        }


def make_plan(question: Question) -> Plan:
    """Answer a question."""
    return _put_together(question, trained(question), served(question))


_REFIT_FOR = (
    "cache_bytes_per_number",
    "device_bytes",
    "context_tokens",
    "num_sequences",
    "reserve_fraction",
    "micro_batch",
    "sequence_tokens",
)


def figure_under(plan: Plan, settings: Settings, name: str) -> Figure | None:
    """One figure under other numbers; nothing is worked out that it does not need.

    The splits are searched again only where a number decides what fits, so that many answers take no time.
    """
    question = replace(plan.question, settings=settings)
    before = plan.question.settings.numbers
    refit = any(one.value != before[key].value for key, one in settings.numbers.items() if key in _REFIT_FOR)
    section = next(title for title, figures in plan.sections.items() if any(one.name == name for one in figures))
    training = trained(question) if refit and section == "Memory" else plan.training
    serving = served(question) if refit and section in ("Memory", "Serving") else plan.serving
    return next((one for one in _SECTIONS[section](question, training, serving) if one.name == name), None)


def _put_together(question: Question, training: Trained | None, serving: Served | None) -> Plan:
    sections = {title: tuple(figures(question, training, serving)) for title, figures in _SECTIONS.items()}
    return Plan(
        question=question,
        training=training,
        serving=serving,
        sections={title: figures for title, figures in sections.items() if figures},
    )


_SECTIONS: dict[str, Callable[[Question, Trained | None, Served | None], Iterator[Figure]]] = {
    "Model": lambda question, training, serving: size_figures(question),
    "Memory": fitting_figures,
    "Training": lambda question, training, serving: training_figures(question, training),
    "Serving": lambda question, training, serving: serving_figures(question, serving),
}
"""In reading order."""
