"""A Ctrl-C that no code could answer is sent again."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

AGAIN_SECONDS = 0.05


@contextlib.contextmanager
def interrupts_kept() -> Iterator[None]:
    """Inside this context, a KeyboardInterrupt that Python would only report and ignore is raised again a moment later.

    Python ignores what is raised in a finalizer or in a callback of the garbage collector, such as the one that JAX
    installs. A Ctrl-C that arrives just then would be lost (`sys.unraisablehook`).
    """
    before = sys.unraisablehook

    def hook(ignored: "sys.UnraisableHookArgs") -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            before(ignored)
            return
        again = threading.Timer(AGAIN_SECONDS, _interrupt)  # raised right here, it would be ignored too
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _interrupt() -> None:
    """Sends the signal to the main thread, which also ends a wait in a call of the system."""
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, signal.SIGINT)
