"""Reports on runs: read what a run left behind, write one page."""

from shoal.report.brief import ReportPaths, write_report

__all__ = ["ReportPaths", "write_report"]
