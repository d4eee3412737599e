"""`Claim`: one row of `docs/claims.md`, a published statement with the figures that it rests on, and ours."""

from dataclasses import dataclass

from shoal.planner.published_figure import PublishedFigure


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published statement."""

    number: int
    """Its row in the claims table that this project collects."""
    title: str
    figures: tuple[PublishedFigure, ...]
    command: str
    """Gives our figures."""
    words: str = ""
    """What has to be said beside the figures, above all where one of them cannot be recomputed."""

    @property
    def agrees(self) -> bool:
        """Every figure that can be recomputed does, to its tolerance."""
        return all(one.agrees for one in self.figures if not one.not_recomputable)


def figure(
    name: str,
    unit: str,
    published: float | None,
    ours: float | None,
    formula: str,
    source: str,
    *,
    tolerance: float = 0.0,
    why_not: str = "",
) -> PublishedFigure:
    """A figure in one line.

    Args:
        tolerance: in the figure's own unit: how far the two may lie apart by the rounding of what was published.
        why_not: what keeps it from being recomputed.
    """
    return PublishedFigure(
        name=name,
        unit=unit,
        published=published,
        ours=ours,
        formula=formula,
        source=source,
        tolerance_fraction=tolerance / abs(published) if published else 0.0,
        not_recomputable=why_not,
    )
