"""How a command ends that an error stopped: what it says, and its exit code."""

import os
import sys
import traceback

from jaxft.errors import ExitCode, JaxftError, Preempted
from jaxft.terminal import text as terminal


def explained(verb: str, error: BaseException) -> ExitCode:
    """Says what stopped a command, and returns its exit code."""
    if isinstance(error, BrokenPipeError):
        # Whoever read the output, such as `head`, has read enough; Python must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    refused = isinstance(error, JaxftError) or (isinstance(error, OSError) and error.strerror is not None)
    if refused or isinstance(error, Preempted | KeyboardInterrupt):
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        if isinstance(error, OSError):
            text = ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
        terminal.write(f"jaxft {verb}: {text}", error=True)
    else:
        print(terminal.safe_text("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    if refused:
        return ExitCode.REFUSED
    if isinstance(error, Preempted):
        return ExitCode.PREEMPTED
    return ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.FAILED
