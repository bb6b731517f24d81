"""Commands of other programs. Every effect outside this machine goes through one function, which tests replace."""

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

TIMED_OUT = 124  # the code that timeout(1) of coreutils gives


@dataclass(frozen=True)
class Done:
    """How a command ended. code: its exit code, TIMED_OUT after a time limit. out, err: what it wrote."""

    code: int
    out: str
    err: str


class Run(Protocol):
    """Runs one command to its end. It is never a shell string, and secrets go in through `stdin` alone."""

    def __call__(self, argv: Sequence[str], *, stdin: bytes = b"", seconds: float | None = None) -> Done:
        """argv: the program and its arguments. stdin: the bytes that it reads. seconds: the time limit."""
        ...


def run(argv: Sequence[str], *, stdin: bytes = b"", seconds: float | None = None) -> Done:
    """Runs a command of this machine. Raises FileNotFoundError if the program is not there."""
    try:
        done = subprocess.run(list(argv), input=stdin, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        return Done(TIMED_OUT, _text(error.stdout), f"no end after {seconds:g} s")
    return Done(done.returncode, _text(done.stdout), _text(done.stderr))


def quoted(argv: Sequence[str]) -> str:
    """The command as a line that can be pasted into a shell."""
    return shlex.join(argv)


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", errors="replace")
