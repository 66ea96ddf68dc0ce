"""The report: reads the files of runs and writes a page that shows them; imports no torch."""

from fbnas.report.page import build_comparison, write_report

__all__ = ["build_comparison", "write_report"]
