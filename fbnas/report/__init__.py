"""The report: reads the files of a run and writes one page that shows it; imports no torch."""

from fbnas.report.page import write_report

__all__ = ["write_report"]
