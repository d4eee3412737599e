"""Plans as tables for a terminal: a figure a line, with its unit, its range where a range is the truth, and remarks below."""

import math

from rich import box
from rich.console import Console
from rich.table import Table

from shoal.planner.plan.figure import Figure
from shoal.planner.plan.whole import Plan


def show_plan(plan: Plan) -> None:
    """Print every section."""
    console = Console(highlight=False)
    question = plan.question
    assumed = "" if question.is_hardware_given else " (assumed; name yours with --fit)"
    console.print(f"[bold]{_plain(question.model.name)}[/] on {_plain(question.cluster.name)}{assumed}")
    for title, figures in plan.sections.items():
        table = _table(title)
        for figure in figures:
            table.add_row(figure.name, readable(figure), _range(figure), figure.label)
        console.print(table)
    notes = {figure.note for figure in plan.figures.values() if figure.note}
    for note in sorted(notes):
        console.print(f"[dim]note: {_plain(note)}[/]")
    console.print("[dim]--explain NAME shows formula, inputs and sources; --set KEY=VALUE changes an assumption.[/]")


def readable(figure: Figure) -> str:
    """A value with its unit, in three to four digits and a fitting prefix."""
    return "not known" if figure.value is None else amount(figure.value, figure.unit)


def amount(value: float | str, unit: str) -> str:
    """`70272, bytes` -> `70.3 kB`; hours stay hours, dollars dollars."""
    if isinstance(value, str):
        return value
    if unit == "bytes":
        return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB"))
    if unit == "FLOP":
        return (
            _scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))
            if value < 1e21
            else f"{value:.4g} FLOP"
        )
    if unit in ("parameters", "tokens"):
        return _scaled(value, ("", "K", "M", "B", "T")).strip() + (" tokens" if unit == "tokens" else "")
    if unit in ("kWh", "h", "USD", "kg CO2e") and value >= 1000:
        return f"{value:,.0f} {unit}"
    if unit == "fraction":
        return f"{100 * value:.3g} %"
    return f"{value:.4g} {unit}"


def _range(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"{amount(figure.low, figure.unit)} to {amount(figure.high, figure.unit)}"


def _table(title: str) -> Table:
    style = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE, "padding": (0, 1), "show_header": False}
    table = Table(title=title, **style)  # type: ignore[arg-type]
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    table.add_column(style="dim", overflow="fold")
    return table


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0 if value < 1000 else min(len(units) - 1, int(math.log10(value)) // 3)
    return f"{value / 1000**power:.4g} {units[power]}"


def _plain(text: str) -> str:
    """Text without the square brackets that rich would read as markup."""
    return text.replace("[", r"\[")
