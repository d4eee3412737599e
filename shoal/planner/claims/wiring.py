"""The topology table of "Insights into DeepSeek-V3": fifteen counts, and five costs that need a fit."""

from collections.abc import Iterator

from shoal.planner.claims.claim import Claim, figure
from shoal.planner.network import published_topologies
from shoal.planner.published_figure import PublishedFigure

_TABLE = "ISCA 2025 table 3"
_PUBLISHED: dict[str, tuple[int, int, int, float]] = {
    "FT2": (2_048, 96, 2_048, 9),
    "MPFT": (16_384, 768, 16_384, 72),
    "FT3": (65_536, 5_120, 131_072, 491),
    "SF": (32_928, 1_568, 32_928, 146),
    "DF": (261_632, 16_352, 384_272, 1_522),
}
"""Endpoints, switches, links between switches, millions of USD."""


def network_claims() -> tuple[Claim, ...]:
    """One claim with twenty figures."""
    return (
        Claim(
            number=42,
            title="endpoints, switches, links and costs of five networks of 64-port switches",
            command="shoal plan --claim 42",
            words="the costs come without unit prices: ours are a fit of three prices to the five rounded totals, so they show only that "
            "one set of prices explains them to a percent; the table's Slim Fly (q = 28) cannot be constructed, only counted",
            figures=tuple(_figures()),
        ),
    )


def _figures() -> Iterator[PublishedFigure]:
    for name, topology in published_topologies().items():
        endpoints, switches, links, millions = _PUBLISHED[name]
        yield figure(
            f"{name} endpoints", "endpoints", endpoints, topology.endpoints, "shoal/planner/network.py", _TABLE
        )
        yield figure(f"{name} switches", "switches", switches, topology.switches, "shoal/planner/network.py", _TABLE)
        yield figure(f"{name} links", "links", links, topology.links, "shoal/planner/network.py", _TABLE)
        cost = topology.cost_usd / 1e6
        yield figure(
            f"{name} cost (fit)", "million USD", millions, cost, "fitted unit prices", _TABLE, tolerance=0.01 * millions
        )
