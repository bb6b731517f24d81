"""What Orbax and TensorStore print about errors that they raise too, which are reported once, as a message of ours."""

import logging
import sys
from types import TracebackType


class _Reported(logging.Filter):
    """Leaves out the tracebacks of errors in Orbax: of those that it logs before it raises them, and of its tasks that
    nobody awaits any more when another one has failed.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and ("orbax" in record.pathname or "/orbax/" in record.getMessage()))


def quiet_libraries() -> None:
    """Keeps these tracebacks from standard error, for the rest of the process. Everything else is printed as before."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    if any(isinstance(each, _Reported) for each in loggers[0].filters):
        return
    for logger in loggers:
        logger.addFilter(_Reported())
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not _is_late_answer(unraisable.exc_value, unraisable.exc_traceback):
            before(unraisable)

    sys.unraisablehook = hook


def _is_late_answer(error: BaseException | None, trace: TracebackType | None) -> bool:
    """Whether a thread of TensorStore answers to an event loop that Orbax closed at the first error of several."""
    return (
        isinstance(error, RuntimeError)
        and str(error) == "Event loop is closed"
        and trace is not None
        and trace.tb_frame.f_code.co_name == "call_soon_threadsafe"
    )
