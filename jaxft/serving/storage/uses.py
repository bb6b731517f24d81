"""Folders of models that are in use: they are deleted once nobody needs them any more."""

import threading
from collections import Counter
from collections.abc import Callable


class Uses:
    """Counts the users of folders, by name, for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: Counter[str] = Counter()
        self._waiting: dict[str, Callable[[], None]] = {}

    def begin(self, folder: str) -> None:
        """Counts one user in."""
        with self._lock:
            self._users[folder] += 1

    def end(self, folder: str) -> None:
        """Counts one user out, and does what waited for the last one."""
        with self._lock:
            self._users[folder] -= 1
            if self._users[folder]:
                return
            del self._users[folder]
            call = self._waiting.pop(folder, None)
        if call is not None:
            call()

    def when_free(self, folder: str, call: Callable[[], None]) -> None:
        """Calls it once the folder has no users: now, or when the last one leaves."""
        with self._lock:
            if self._users[folder]:
                self._waiting[folder] = call
                return
            del self._users[folder]
        call()
