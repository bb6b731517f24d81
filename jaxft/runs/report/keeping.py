"""The report of a run that goes on whether or not its report can be made."""

import time
from collections.abc import Callable
from pathlib import Path

from jaxft.runs.report.page import write_report

EVERY = 60.0  # seconds between reports of a run that goes on: the devices wait while charts are drawn


class KeptReport:
    """Writes the report of a run again and again. An error is told, once in a row, and ends nothing.

    folder: of the run. say: told of errors. clock: seconds.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._say, self._failed = folder, say, False
        self._clock, self._last = clock, clock()

    def refresh(self) -> None:
        """Makes the report anew unless the last one, or the beginning, was less than a minute ago."""
        if self._clock() - self._last >= EVERY:
            self.write()
            self._last = self._clock()

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
