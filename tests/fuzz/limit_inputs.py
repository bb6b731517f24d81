"""One function for each failure that the limits are to notice."""

import contextlib
import os
import subprocess
from pathlib import Path

from fuzz.limits import one_input

from jaxft.errors import DataError


def refusals() -> None:
    for text in ("", "no rows", "no columns"):
        with one_input():
            Path("inside").write_text(text)
            if text:
                raise DataError(text)


def traceback() -> None:
    with one_input():
        _ = 1 / len("")


def memory() -> None:
    with one_input():
        _ = bytearray(2**30)


def hang() -> None:
    with one_input():
        while True:
            pass


def write() -> None:
    with one_input():
        Path("../outside").write_text("x")


def hidden_write() -> None:
    with one_input(), contextlib.suppress(BaseException):
        open("../outside", "x")


def removal() -> None:
    with one_input():
        os.remove(__file__ + ".none")


def program() -> None:
    with one_input():
        subprocess.run(["true"])


def silent() -> None:
    with one_input():
        raise DataError("")
