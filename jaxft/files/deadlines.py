"""Ends for reads over a network: a server that accepts and never answers, or stops in the middle, holds nobody up."""

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

READ_SECONDS = 60.0  # for one answer: a listing, or one piece of a file
PIECE = 2**26  # bytes of a file that are asked for at a time, so that 1 MB/s is fast enough
ATTEMPTS = 3
PAUSE_SECONDS = 1.0  # before the second attempt; four times as long before each later one


def within(action: Callable[[], Result], seconds: float | None = None) -> Result:
    """What an action returns or raises. Raises TimeoutError if it has not ended after `seconds`, or READ_SECONDS.

    It then stays in its thread, which does not keep the process alive.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:  # it is raised below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="read", daemon=True)
    thread.start()
    seconds = READ_SECONDS if seconds is None else seconds
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return results[0]


def repeated(action: Callable[[], Result]) -> Result:
    """`within` of an action that may be repeated: ATTEMPTS times, if the network fails or nothing is answered.

    Raises the last error; a TimeoutError says how often it was tried.
    """
    for attempt in range(ATTEMPTS):
        try:
            return within(action)
        except (TimeoutError, ConnectionError) as error:
            if attempt + 1 == ATTEMPTS:
                reason = str(error) or type(error).__name__
                raise TimeoutError(f"{reason}, {ATTEMPTS} times, so the server or the network fails") from error
            time.sleep(PAUSE_SECONDS * 4**attempt)
    raise ValueError("ATTEMPTS is below 1")


class TimedFile:
    """A file of a store whose reads each have a deadline; everything else is the file's own."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """As the file's own. Raises TimeoutError after READ_SECONDS."""
        return within(lambda: self._file.read(size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "TimedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
