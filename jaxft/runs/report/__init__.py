"""The report of a run: one page and a picture, made from the files of its folder."""

from jaxft.runs.report.keeping import KeptReport
from jaxft.runs.report.page import write_report
from jaxft.runs.report.texts import wilson_interval

__all__ = ["KeptReport", "wilson_interval", "write_report"]
