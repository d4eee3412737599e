"""All claims together, and the table of `docs/claims.md`: written from here, so that it cannot say anything else."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from shoal.errors import ConfigError
from shoal.planner.claims.claim import Claim
from shoal.planner.claims.cost import cost_claims
from shoal.planner.claims.serving import serving_claims
from shoal.planner.claims.sizes import size_claims
from shoal.planner.claims.wiring import network_claims

BEGIN, END = "<!-- planner claims: written by `shoal plan --claims --markdown` -->", "<!-- end of planner claims -->"


def all_claims() -> tuple[Claim, ...]:
    """By number."""
    found = (*size_claims(), *cost_claims(), *serving_claims(), *network_claims())
    return tuple(sorted(found, key=lambda one: one.number))


def claim(number: int) -> Claim:
    """One row.

    Raises:
        ConfigError: there is none of that number here.
    """
    claims = all_claims()
    for one in claims:
        if one.number == number:
            return one
    raise ConfigError(f"no claim {number} here; the planner recomputes {', '.join(str(one.number) for one in claims)}.")


def markdown(claims: Sequence[Claim]) -> str:
    """The table of the document, between its two marks."""
    lines = [
        "| # | claim | figure | published | source | our command | ours | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in claims:
        for index, figure in enumerate(one.figures):
            first = index == 0
            title = f"{one.title}{f'. *{one.words}*' if one.words else ''}" if first else ""
            cells = (
                str(one.number) if first else "",
                title,
                f"{figure.name}, {figure.unit}",
                written(figure.published),
                figure.source if first or figure.source != one.figures[0].source else "",
                f"`{one.command}`" if first else "",
                f"{written(figure.ours)} = {figure.formula}",
                figure.verdict,
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([BEGIN, "", *lines, "", END])


def claims_json(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Plain values, each figure with its verdict."""
    return [
        {
            "number": one.number,
            "title": one.title,
            "command": one.command,
            "words": one.words,
            "agrees": one.agrees,
            "figures": [{**asdict(figure), "verdict": figure.verdict} for figure in one.figures],
        }
        for one in claims
    ]


def written(value: float | None) -> str:
    """A figure as it stands in the table: whole numbers whole, others to five digits."""
    if value is None:
        return "none"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.2f}" if abs(value) >= 10_000 else f"{value:.5g}"
