"""Plans as tables for a terminal: a figure a line, with its unit, its range where a range is the truth, and remarks below."""

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from shoal.planner.claims.claim import Claim
from shoal.planner.claims.table import written
from shoal.planner.network import Comparison as Wiring
from shoal.planner.network import UnitPrices
from shoal.planner.plan.compare import Comparison
from shoal.planner.plan.expert_balance import ExpertBalance
from shoal.planner.plan.explain import Explanation
from shoal.planner.plan.figure import Figure
from shoal.planner.plan.sensitivity import Sensitivity
from shoal.planner.plan.sizes import parameters_by_part
from shoal.planner.plan.whole import Plan
from shoal.recipes.planned_run import PlannedRun

WIDE_COLUMNS = 120
"""From here on a figure, its range and what it means fit on one line."""


def show_plan(plan: Plan) -> None:
    """Print every section."""
    console = Console(highlight=False)
    question = plan.question
    hardware = question.cluster.name
    if not question.is_hardware_given:
        hardware = f"{question.cluster.device.name}, as many as it takes; name your own with --fit"
    console.print(f"[bold]{_plain(question.model.name)}[/] on {_plain(hardware)}")
    for title, figures in plan.sections.items():
        _show_figures(console, title, figures)
        for line in _parts(plan, title):
            console.print(f"  [dim]{line}[/]")
    notes = {figure.note for figure in plan.figures.values() if figure.note}
    for note in sorted(notes):
        console.print(f"[dim]note: {_plain(note)}[/]")
    console.print("[dim]--explain NAME shows formula, inputs and sources; --set KEY=VALUE changes an assumption.[/]")


def _show_figures(console: Console, title: str, figures: Sequence[Figure]) -> None:
    """A figure a line; where the terminal is too narrow for what it means, that stands on a line of its own."""
    if console.width >= WIDE_COLUMNS:
        table = _table(title)
        for figure in figures:
            table.add_row(figure.name, readable(figure), _range(figure), figure.label)
        console.print(table)
        return
    console.print(f"[bold]{title}[/]")
    name_width = max(len(figure.name) for figure in figures)
    value_width = max(len(readable(figure)) for figure in figures)
    for figure in figures:
        line = f"  {figure.name:<{name_width}}  {readable(figure):>{value_width}}"
        spread = _range(figure)
        console.print(f"{line}  {spread}" if len(line) + len(spread) + 2 <= console.width else line)
        told_apart = spread and len(line) + len(spread) + 2 > console.width
        console.print(Padding(f"[dim]{_plain(figure.label)}{f'; {spread}' if told_apart else ''}[/]", (0, 0, 0, 4)))
    console.print()


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
    if unit in ("bytes/s", "FLOP/s") and value >= 1000:
        return _scaled(
            value, tuple(f"{prefix}{unit.replace('bytes', 'B')}" for prefix in ("", "k", "M", "G", "T", "P", "E"))
        )
    if unit in ("parameters", "tokens"):
        return _scaled(value, ("", "K", "M", "B", "T")).strip() + (" tokens" if unit == "tokens" else "")
    if unit in ("kWh", "h", "USD", "kg CO2e", "tokens/s", "J", "machines") and abs(value) >= 1000:
        return f"{value:,.0f} {unit}"
    if unit == "fraction":
        return f"{100 * value:.3g} %"
    return f"{value:.4g} {unit}"


def _parts(plan: Plan, section: str) -> list[str]:
    """What a section's totals are made of, in one line each."""
    found: list[tuple[str, Mapping[str, int], str]] = []
    if section == "Model":
        found = [("parameters", parameters_by_part(plan.question.model), "parameters")]
    if section == "Memory":
        found = [("training", plan.training.memory.by_part(), "bytes")] if plan.training else []
        found += [("serving", plan.serving.memory.by_part(), "bytes")] if plan.serving else []
    return [f"{name}: {_share_of(parts, unit)}\n" for name, parts, unit in found if parts]


def _share_of(parts: Mapping[str, int], unit: str) -> str:
    largest_first = sorted(((size, part) for part, size in parts.items() if size), reverse=True)
    total = sum(parts.values())
    return ", ".join(f"{part} {amount(size, unit)} ({100 * size / total:.2g} %)" for size, part in largest_first)


def _range(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    low, high = amount(figure.low, figure.unit), amount(figure.high, figure.unit)
    unit = high.partition(" ")[2]
    return f"{low.removesuffix(' ' + unit) if unit else low} to {high}"


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


def show_comparison(found: Comparison) -> None:
    """Models in columns, each figure with how many times the first one's it is."""
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE, padding=(0, 1))
    table.add_column("")
    for model in found.models:
        table.add_column(_plain(model), justify="right")
    for row in found.rows:
        cells = ["" if value is None else amount(value, row.unit) for value in row.values]
        for index, times in enumerate(row.times[1:], start=1):
            if times is not None and times != 1:
                cells[index] += f"  [dim]{times:.3g}x[/]"
        table.add_row(row.name, *cells)
    console.print(table)
    for note in found.notes:
        console.print(f"[dim]note: {_plain(note)}[/]")


def show_sensitivity(found: Sensitivity) -> None:
    """Assumptions, the one that matters most first, with a bar of its span."""
    console = Console(highlight=False)
    console.print(f"[bold]{found.figure}[/] = {amount(found.value, found.unit)}; each assumption moved alone:")
    table = Table(box=box.SIMPLE, padding=(0, 1))
    for title in ("assumption", "from", "to", found.figure, "", "span"):
        table.add_column(
            title, justify="left" if title in ("assumption", "") else "right", no_wrap=title == "assumption"
        )
    widest = max((effect.span_fraction for effect in found.effects), default=0) or 1
    for effect in found.effects:
        table.add_row(
            effect.key,
            amount(effect.low, effect.unit),
            amount(effect.high, effect.unit),
            f"{amount(effect.at_low, found.unit)} to {amount(effect.at_high, found.unit)}",
            "█" * round(16 * effect.span_fraction / widest),
            f"{100 * effect.span_fraction:.3g} %",
        )
    console.print(table)


def show_explanation(found: Explanation) -> None:
    """A figure from result to sources."""
    console = Console(highlight=False)
    value = "not known" if found.value is None else amount(found.value, found.unit)
    exact = f" ({found.value:,} {found.unit})" if isinstance(found.value, int) and found.value >= 1000 else ""
    console.print(f"[bold]{found.name}[/] = {value}{exact}: {_plain(found.label)}")
    if found.low is not None and found.high is not None:
        console.print(f"range    {amount(found.low, found.unit)} to {amount(found.high, found.unit)}")
    console.print(f"formula  {_plain(found.formula)}")
    console.print(f"source   {_plain(found.source)}")
    if found.note:
        console.print(f"note     {_plain(found.note)}")
    table = Table(box=box.SIMPLE, padding=(0, 1))
    for title in ("rests on", "value", "assumed" if found.inputs else "", "source"):
        table.add_column(
            title, justify="right" if title == "value" else "left", overflow="fold", no_wrap=title == "rests on"
        )
    for one in found.inputs:
        shown = "not known" if one.value is None else amount(one.value, one.unit)
        table.add_row(one.name, shown, "yes" if one.is_assumption else "", _plain(one.source))
    if found.inputs:
        console.print(table)


def show_run(found: PlannedRun) -> None:
    """Foretold beside found, with the error."""
    console = Console(highlight=False)
    so_far = "" if found.steps_reached == found.steps else f", so far {found.steps_reached} of {found.steps} steps"
    stage = f"stage {_plain(found.stage)}{so_far}"
    console.print(f"[bold]{_plain(found.run)}[/], {stage}; calibration: {_plain(found.calibration)}")
    is_wide = console.width >= WIDE_COLUMNS
    table = Table(box=box.SIMPLE, padding=(0, 1))
    for title in ("", "predicted", "measured", "error", *(["from"] if is_wide else [])):
        table.add_column(
            title, justify="right" if title in ("predicted", "measured", "error") else "left", overflow="fold"
        )
    for one in found.outcomes:
        measured = "not recorded" if one.measured is None else amount(one.measured, one.unit)
        error = "" if one.error_fraction is None else f"{100 * one.error_fraction:+.1f} %"
        cells = [_plain(one.label), amount(one.predicted, one.unit), measured, error]
        table.add_row(*cells, *([_plain(one.how)] if is_wide else []))
    console.print(table)
    if not is_wide:
        for one in found.outcomes:
            console.print(f"[dim]{_plain(one.label)}: {_plain(one.how)}[/]")


def show_claims(claims: Sequence[Claim]) -> None:
    """Every claim with its figures, and what has to be said beside them."""
    console = Console(highlight=False)
    for claim in claims:
        console.print(f"[bold]{claim.number}. {_plain(claim.title)}[/]")
        table = Table(box=None, padding=(0, 1), show_header=False)
        for index in range(4):
            table.add_column(justify="right" if index == 1 else "left", overflow="fold")
        for one in claim.figures:
            ours = f"ours {written(one.ours)} = {one.formula}"
            table.add_row(f"{one.name}, {one.unit}", written(one.published), _plain(ours), one.verdict)
        console.print(table)
        console.print(f"[dim]{_plain(_sources(claim))}{f'; {_plain(claim.words)}' if claim.words else ''}[/]\n")


def _sources(claim: Claim) -> str:
    """The sources of a claim's figures, each once."""
    return "; ".join(dict.fromkeys(one.source for one in claim.figures))


def show_wiring(found: Wiring, prices: UnitPrices) -> None:
    """Networks side by side, cheapest first."""
    console = Console(highlight=False)
    console.print(f"[bold]{found.wanted_endpoints:,} endpoints[/]")
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("", no_wrap=True)
    for one in found.topologies:
        table.add_column(_plain(one.name), justify="right")
    rows = {
        "endpoints": [one.endpoints for one in found.topologies],
        "switches": [one.switches for one in found.topologies],
        "links": [one.links for one in found.topologies],
        "transceivers": [one.transceivers for one in found.topologies],
        "fibres": [one.fibres for one in found.topologies],
        "MPO trunks": [one.mpo_trunks for one in found.topologies],
        "USD": [round(one.cost_usd) for one in found.topologies],
        "USD each": [round(one.cost_usd_per_endpoint) for one in found.topologies],
    }
    for name, counts in rows.items():
        table.add_row(name, *(f"{count:,}" for count in counts))
    console.print(table)
    for name, most in found.too_small:
        console.print(f"[dim]{_plain(name)}: at most {most:,} endpoints with these switches[/]")
    for price in prices.listed():
        console.print(f"[dim]{price.name} {price.value:g} {price.unit}: {_plain(price.source)}[/]")


def show_balance(found: ExpertBalance) -> None:
    """Busiest device over the mean, before and after."""
    console = Console(highlight=False)
    console.print(
        f"[bold]{_plain(found.model)}[/]: {found.num_experts} experts in {found.num_slots} slots on {found.num_devices} devices of "
        f"{found.num_nodes} machines; loads {_plain(found.loads)}"
    )
    table = Table(box=box.SIMPLE, padding=(0, 1))
    for title in ("policy", "busiest over mean before", "after", "worst layer after", "most copies", ""):
        table.add_column(title, justify="left" if title in ("policy", "") else "right")
    for one in found.policies:
        figures = (f"{one.mean_before:.3f}", f"{one.mean_after:.3f}", f"{one.worst_after:.3f}", str(one.most_replicas))
        table.add_row(one.policy, *figures, f"not possible: {one.why_not}" if one.why_not else "")
    console.print(table)
