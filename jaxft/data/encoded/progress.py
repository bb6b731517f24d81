"""How far the tokenising of a set is, in a line of the log now and then."""

import logging
import time
from threading import Lock

from jaxft.errors import counted

log = logging.getLogger(__name__)

EVERY = 10.0  # seconds between two lines, and before the first


class Progress:
    """Counts the rows that are done, in any thread. total: rows of the set. source: its name."""

    def __init__(self, total: int, source: str) -> None:
        self._total, self._source, self._done, self._lock = total, source, 0, Lock()
        self._began = self._told = time.monotonic()

    def add(self, rows: int) -> None:
        """Counts rows that are done, and says how many they are if that was not said for a while."""
        with self._lock:
            self._done += rows
            now, left = time.monotonic(), self._total - self._done
            if now - self._told < EVERY or not left:
                return
            self._told = now
            seconds = round((now - self._began) * left / self._done)
            log.info(
                "tokenised %s of %s of %s; about %d:%02d minutes more",
                f"{self._done:,}", counted(self._total, "row"), self._source, *divmod(seconds, 60),
            )  # fmt: skip
