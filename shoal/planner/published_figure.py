"""A figure that somebody published, beside the same from the published inputs; and those whose inputs are missing."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedFigure:
    """A published figure beside ours."""

    name: str
    unit: str
    published: float | None
    """None where nothing was."""
    ours: float | None
    formula: str
    source: str
    tolerance_fraction: float = 0.0
    """How far the two may lie apart by the rounding of what was published."""
    not_recomputable: str = ""
    """Why one of the two is missing or follows from nothing published; empty where ours should be equal."""

    @property
    def error_fraction(self) -> float | None:
        """Ours over published, less one; None where one is missing."""
        return None if self.published is None or self.ours is None else self.ours / self.published - 1

    @property
    def agrees(self) -> bool:
        """Both are there, and equal within the tolerance."""
        error = self.error_fraction
        return error is not None and abs(error) <= max(self.tolerance_fraction, 1e-9)

    @property
    def verdict(self) -> str:
        """`equal`, `agrees, +0.3 %` (within the rounding of what was published), `differs by +5 %`, `not recomputable` (with how far ours is, where there is one) or `nothing published`."""
        error = self.error_fraction
        if error is None:
            return "nothing published" if self.published is None else "not recomputable"
        if self.not_recomputable:
            return f"not recomputable; ours {100 * error:+.2g} %"
        if abs(error) < 1e-9:
            return "equal"
        if abs(error) <= self.tolerance_fraction:
            return f"agrees, {100 * error:+.2g} %"
        return f"differs by {100 * error:+.2g} %"


@dataclass(frozen=True, kw_only=True)
class NotRecomputed:
    """A published figure that its published inputs do not give."""

    figure: str
    published: str
    ours: str
    why: str
