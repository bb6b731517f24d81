"""The report of a run that goes on whether or not its report can be made."""

from collections.abc import Callable
from pathlib import Path

from jaxft.runs.report.page import write_report


class KeptReport:
    """Writes the report of a run again and again. An error is told, once in a row, and ends nothing.

    folder: of the run. say: told of errors.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say, self._failed = folder, say, False

    def write(self) -> dict[str, str]:
        """Makes the report of what the folder holds now. Returns its entries of summary.json; {} after an error."""
        try:
            html, png = write_report(self._folder)
        except Exception as error:  # of the disk, or of the libraries that draw
            if not self._failed:
                self._say(f"warning: no report was written ({type(error).__name__}: {error}), and the run goes on")
            self._failed = True
            return {}
        self._failed = False
        return {"report": html.name, "loss_plot": png.name}
