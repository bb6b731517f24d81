"""Errors that a user can correct, which the command line prints without a traceback, and its exit codes."""

import difflib
import enum
from collections.abc import Iterable, Sequence

LISTED = 8  # items named in one message, if the caller does not say how many


class ExitCode(enum.IntEnum):
    """How a command ended, for the shell or the program that started it.

    DONE: the command did its work. FAILED: an error that jaxft does not explain, shown with its traceback. REFUSED: a
    JaxftError, options that argparse refuses, or an error of the operating system, such as a full disk. NOT_MET: the
    work was done, and what an option required of its result does not hold. PEER_LOST: another process of the same run
    failed or disappeared. PREEMPTED: stopped by SIGTERM or SIGHUP after saving; the same command continues the run.
    INTERRUPTED: stopped by Ctrl-C.

    Sources: 69 and 75 are EX_UNAVAILABLE and EX_TEMPFAIL of sysexits.h. 2 is the code of argparse. 130 is the code of
    shells for a command that signal 2, SIGINT, ended: 128 + 2.
    """

    DONE = 0
    FAILED = 1
    REFUSED = 2
    NOT_MET = 3
    PEER_LOST = 69
    PREEMPTED = 75
    INTERRUPTED = 130


class JaxftError(Exception):
    """Something outside jaxft is wrong. The message says what is wrong, why, and how to correct it."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it, which is no traceback, as on the command line. IPython calls this."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(JaxftError, ValueError):
    """A run configuration that cannot be carried out."""


class DataError(JaxftError, ValueError):
    """Training or evaluation data that cannot be used as the configuration says."""


class ModelError(JaxftError, ValueError):
    """A model, adapter or tokenizer that jaxft does not fully understand."""


class CheckpointError(JaxftError, ValueError):
    """A file or folder of weights that is damaged, unsafe, or not what it claims to be."""


class ExportError(JaxftError, RuntimeError):
    """A written model that does not reproduce the one in memory."""


class FolderInUseError(JaxftError, RuntimeError):
    """A folder or a file that another process is writing."""


class PeerLostError(JaxftError):
    """Another process of the same run did not come, or has ended. Commands end with ExitCode.PEER_LOST."""


class NotMetError(JaxftError):
    """What an option required of a result does not hold. Commands end with ExitCode.NOT_MET."""


class PodError(JaxftError, RuntimeError):
    """Google Cloud, or a host there, did not do what was requested."""


class BucketError(JaxftError, RuntimeError):
    """A bucket refused what was requested of it, or did not answer."""


class Preempted(Exception):
    """The machine is about to be reclaimed, or the terminal was closed; everything up to `step` is saved."""

    def __init__(self, step: int) -> None:
        when = f"after step {step}, which is saved" if step else "before the first step"
        super().__init__(f"stopped by SIGTERM or SIGHUP {when}; run the same command to go on")
        self.step = step


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`" Did you mean 'batch_size'?"` if the name is close to one of the choices, else an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def counted(count: int, noun: str, verb: str = "", verb_of_many: str = "") -> str:
    """`1 row`, or `1,204 rows are`: a number with a noun whose plural ends in s, and a verb if one is given."""
    ending, form = ("", verb) if count == 1 else ("s", verb_of_many)
    return f"{count:,} {noun}{ending} {form}".rstrip()


def listed(items: Sequence[object], most: int = LISTED, *, lines: bool = False) -> str:
    """The first items, and the number of the others: `a, b, c and 1,204 more`.

    lines: each item is on its own line, indented by two spaces, without a line break before the first; the last line is
    then `  ... and 1,204 more`.
    """
    shown, rest = list(map(str, items[:most])), len(items) - most
    if lines:
        return "\n".join(f"  {line}" for line in shown + ([f"... and {rest:,} more"] if rest > 0 else []))
    return ", ".join(shown) + (f" and {rest:,} more" if rest > 0 else "")
