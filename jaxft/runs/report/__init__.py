"""The report of a run: one page and a picture, made from the files of its folder."""

from jaxft.runs.report.keeping import KeptReport
from jaxft.runs.report.page import write_report

__all__ = ["KeptReport", "write_report"]
