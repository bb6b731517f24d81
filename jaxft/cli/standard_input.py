"""Lines that a person or a program gives on standard input."""

import io
import sys
from typing import TextIO

from jaxft.errors import ConfigError, DataError
from jaxft.system import undecoded


def standard_input(verb: str, instead: str) -> TextIO:
    """Standard input, whose bytes that are not UTF-8 arrive as lone surrogates, so that one bad line ends nothing.

    instead: what to give if it is closed, for the message. Raises ConfigError if it is closed.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError(f"{verb} reads from standard input, and it is closed: {instead}")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin


def prompt_lines() -> list[str]:
    """The lines of standard input that are not blank. Raises DataError with the number of a line that is not UTF-8."""
    prompts = []
    for number, line in enumerate(standard_input("generate", "give --prompt=TEXT (again for more)"), 1):
        problem = undecoded(line)
        if problem is not None:
            raise DataError(f"line {number} of standard input {problem}: convert it, as by iconv -f LATIN1 -t UTF-8")
        if line.strip():
            prompts.append(line.rstrip("\n"))
    return prompts
