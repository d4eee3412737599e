"""Charts as SVG text: lines with a band over seeds, grouped bars, a heat map. Colours are CSS variables of the page."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 40, 40
COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--quiet)")


@dataclass(frozen=True)
class Series:
    """One named line."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series], *, band: bool = False) -> str:
    """Lines over a common axis; with `band` also the range over all series at each x. Empty when nothing is to be drawn."""
    series = [one for one in series if one.points]
    if not series:
        return ""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    y_ticks = ticks(min(0.0, min(ys)), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, _height_of(y, y_ticks)

    parts = [_frame(title, x_label, y_label, y_ticks), _x_ticks(ticks(x_low, x_high), x_low, x_high)]
    if band and len(series) > 1:
        parts.append(_band(series, place))
    for index, one in enumerate(series):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in one.points))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[index % 4]}" stroke-width="1.8" stroke-linejoin="round"/>'
        )
    parts.append(_legend([one.name for one in series]))
    return _svg(title, parts)


def bar_chart(title: str, y_label: str, bars: Sequence[tuple[str, Sequence[float]]], names: Sequence[str]) -> str:
    """Groups of bars, one colour per name."""
    if not bars:
        return ""
    y_ticks = ticks(0.0, max(value for _, values in bars for value in values))
    slot = (WIDTH - LEFT - RIGHT) / len(bars)
    width = slot * 0.7 / len(names)
    parts = [_frame(title, "", y_label, y_ticks)]
    for group, (label, values) in enumerate(bars):
        left = LEFT + slot * group + slot * 0.15
        for index, value in enumerate(values):
            top = _height_of(value, y_ticks)
            x = left + width * index
            height = HEIGHT - BOTTOM - top
            parts.append(
                f'<rect x="{x:.1f}" y="{top:.1f}" width="{width - 1:.1f}" height="{height:.1f}" fill="{COLOURS[index % 4]}"/>'
            )
            parts.append(
                f'<text x="{x + width / 2:.1f}" y="{top - 4:.1f}" text-anchor="middle">{_number(value)}</text>'
            )
        parts.append(
            f'<text x="{left + slot * 0.35:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{html.escape(label)}</text>'
        )
    if len(names) > 1:
        parts.append(_legend(names))
    return _svg(title, parts)


def heat_map(title: str, cells: Sequence[Sequence[float]]) -> str:
    """Rows are layers, columns experts; darker is more, and each cell says its share."""
    if not cells or not cells[0]:
        return ""
    top_value = max(max(row) for row in cells)
    width, height = (WIDTH - LEFT - RIGHT) / len(cells[0]), min(40.0, (HEIGHT - TOP - BOTTOM) / len(cells))
    parts = [f'<text class="title" x="{LEFT}" y="18">{html.escape(title)}</text>']
    for row, values in enumerate(cells):
        y = TOP + row * height
        parts.append(f'<text x="{LEFT - 8}" y="{y + height / 2 + 4:.1f}" text-anchor="end">layer {row + 1}</text>')
        for column, value in enumerate(values):
            x, strength = LEFT + column * width, value / top_value
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}" fill="var(--a)" opacity="{0.1 + 0.6 * strength:.2f}"/>'
            )
            if len(values) <= 16:
                parts.append(
                    f'<text x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="middle">{100 * value:.0f}%</text>'
                )
    parts.append(
        f'<text x="{LEFT + (WIDTH - LEFT - RIGHT) / 2}" y="{TOP + len(cells) * height + 18:.1f}" text-anchor="middle">expert</text>'
    )
    return _svg(title, parts)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    span = high - low if high > low else max(abs(high), 1.0)
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def _frame(title: str, x_label: str, y_label: str, y_ticks: Sequence[float]) -> str:
    parts = [
        f'<text class="title" x="{LEFT}" y="18">{html.escape(title)}</text>',
        f'<text x="{LEFT}" y="33">{html.escape(y_label)}</text>',
    ]
    for value in y_ticks:
        y = _height_of(value, y_ticks)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{html.escape(x_label)}</text>')
    return "".join(parts)


def _x_ticks(values: Sequence[float], low: float, high: float) -> str:
    parts = []
    for value in values:
        if low <= value <= high:
            x = LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_number(value)}</text>')
    return "".join(parts)


def _height_of(value: float, y_ticks: Sequence[float]) -> float:
    low, high = y_ticks[0], y_ticks[-1]
    return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _band(series: Sequence[Series], place: Callable[[float, float], tuple[float, float]]) -> str:
    """The range over all series at the steps they share."""
    values = [dict(one.points) for one in series]
    shared = sorted(set(values[0]).intersection(*values[1:]))
    upper = [place(x, max(value[x] for value in values)) for x in shared]
    lower = [place(x, min(value[x] for value in values)) for x in reversed(shared)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in upper + lower)
    return f'<polygon points="{path}" fill="var(--band)"/>'


def _legend(names: Sequence[str]) -> str:
    parts, x = [], float(WIDTH - RIGHT)
    for index in reversed(range(len(names))):
        x -= 7.0 * len(names[index]) + 8
        parts.append(f'<text x="{x:.1f}" y="33" style="fill:{COLOURS[index % 4]}">{html.escape(names[index])}</text>')
    return "".join(parts)


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _svg(title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{html.escape(title)}</title>{"".join(parts)}</svg>'
