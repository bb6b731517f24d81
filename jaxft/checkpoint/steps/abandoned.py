"""Threads of a save that Orbax began and gave up, which would keep the process from its end for minutes."""

import threading
import warnings

import jax
from orbax.checkpoint._src.futures import future


class SaveThreads:
    """The threads that one save begins, from when this object is made."""

    def __init__(self) -> None:
        self._before = set(threading.enumerate())

    def end(self) -> None:
        """Ends them after an error.

        They wait for a signal that a folder was made, which nobody sends any more, and Python waits for them in turn.
        With several processes they share the signals, and all processes end at once after such an error.
        """
        if jax.process_count() > 1:
            return
        # Their coroutines are never run; Python would print a line for each.
        warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
        for thread in set(threading.enumerate()) - self._before:
            if isinstance(thread, future._SignalingThread):
                thread.cancel()
                future.set_signals(thread._receive_signals, operation_id=thread._operation_id)
