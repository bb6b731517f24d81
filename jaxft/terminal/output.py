"""Output for people that cannot end a run: a closed pipe, a terminal that went away, a full disk below it."""

import contextlib
import os
import sys
from typing import Any

from rich.console import Console


class LastingOutput:
    """A text stream like `stream`, whose errors are told once on standard error and end nothing.

    silent: nothing is told, as of standard error itself. What is written after the first error is discarded. Characters
    that its encoding lacks are escaped.
    """

    def __init__(self, stream: Any, *, silent: bool = False) -> None:
        self._stream, self._lost, self._silent = stream, False, silent

    def write(self, text: str) -> int:
        """Writes text, or discards it."""
        if not self._lost:
            try:
                self._write(text)
            except (OSError, ValueError) as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, if it still works."""
        if not self._lost:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def _lose(self, error: Exception) -> None:
        self._lost = True
        give_up(self._stream)
        reason = getattr(error, "strerror", None) or str(error)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # standard error may be gone too
            if sys.stderr is not None and not self._silent and not self._is_stderr():
                sys.stderr.write(f"jaxft: the output cannot be written ({reason}); the run goes on without it\n")
                sys.stderr.flush()

    def _is_stderr(self) -> bool:
        try:
            return self._stream is sys.stderr or self._stream.fileno() == 2
        except (OSError, ValueError):  # a closed stream, or one of no file
            return False


def give_up(stream: Any) -> None:
    """Lets a stream that failed write to the null device from now on.

    What it has kept back is flushed when Python ends, and would fail again then, and change the exit code.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be closed, or one of no file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def settle(stream: Any) -> None:
    """Flushes a stream before the program ends, and gives it up if that fails."""
    if stream is not None:
        try:
            stream.flush()
        except (OSError, ValueError):
            give_up(stream)


def lasting(console: Console) -> Console:
    """The console, whose output cannot end a run from now on."""
    if not isinstance(console.file, LastingOutput):
        console.file = LastingOutput(console.file)  # type: ignore[assignment]
    return console
