"""Standard streams on which a command can always write."""

import contextlib
import io
import logging
import os
import sys

from jaxft.terminal.output import LastingOutput

PROGRESS = "jaxft.data.encoded.progress"  # the log
SHOWN = (PROGRESS, "jaxft.models.hf_fields")


def prepare_streams() -> None:
    """Makes the standard streams fit for text of any kind, before a command runs.

    Characters that the encoding of a stream lacks are escaped, as `\\xe9`. A stream that was closed when the command
    started becomes the null device, since otherwise the next file that is opened would have its number, and what
    libraries write to standard error would go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)  # takes the lowest free number
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # a pipe that is closed already
                stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        # Whether a message can be read must not change how a command ends, and with which exit code.
        sys.stderr = LastingOutput(sys.stderr, silent=True)  # type: ignore[assignment]


def show_progress() -> None:
    """Shows the lines in which long work says how far it is, and what of a model's config.json is passed over."""
    for name in SHOWN:
        log = logging.getLogger(name)
        if not log.handlers:
            log.addHandler(logging.StreamHandler())
            log.setLevel(logging.INFO)
            log.propagate = False  # libraries give the root logger a handler too


def only_ascii() -> bool:
    """Whether JSON must be written in ASCII, because standard output cannot hold every character."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return encoding.lower().replace("_", "-") not in ("utf-8", "utf8")
