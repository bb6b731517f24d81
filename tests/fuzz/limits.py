"""Runs a function on many inputs in a process of its own, which may neither grow, hang nor write outside a folder.

    report = run_limited("fuzz.rows_inputs:every_row", tmp_path)

The function is a test of hypothesis without arguments, or any other that takes none; each input is tried within
`with one_input():`, which lets pass what jaxft refuses by its own errors and counts both. Any other error, an input
that takes too long, memory beyond the limit and a write outside the folder end the process with a traceback, which
`run_limited` raises.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from jaxft.errors import JaxftError

TESTS = Path(__file__).parent.parent
REPORT = "report.json"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events by which files change, and which of their arguments are paths.
CHANGES = {
    "os.remove": (0,), "os.rmdir": (0,), "os.mkdir": (0,), "os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,),
    "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,), "shutil.rmtree": (0,),
}  # fmt: skip
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.getaddrinfo")

counts: Counter[str] = Counter()
_outside: list[str] = []
_seconds = 20.0


class Outside(BaseException):
    """A change outside the folder. No `except Exception` of the code under test can hide it."""


def run_limited(
    function: str, folder: Path, *, memory_mb: int = 1536, seconds_each: float = 20.0, seconds: float = 3000.0
) -> dict[str, int]:
    """Calls `module:function` in a process with limits. Returns how many inputs were `tried` and `refused`.

    module: below tests/. folder: the only one that may change; the working directory, home and temporary files are in
    it. memory_mb: of address space, beyond what the process has once the module is imported. seconds_each: for one
    input. Raises AssertionError, with what the process wrote, if it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tmp", "home"):
        (folder / name).mkdir(exist_ok=True)
    own = {
        "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "JAXFT_CACHE": str(folder / "home" / "cache"),
        "HF_HOME": str(folder / "home" / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1",
        # Arrow's own pool reserves a gigabyte of addresses at once, which would count as memory.
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }  # fmt: skip
    arguments = [function, str(folder), str(memory_mb), str(seconds_each)]
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), *arguments],
        cwd=folder,
        env=os.environ | own,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
    )
    assert done.returncode == 0, f"{function} ended with {done.returncode}:\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
    report: dict[str, int] = json.loads((folder / REPORT).read_text())
    return report


@contextlib.contextmanager
def one_input() -> Iterator[None]:
    """Tries one input: jaxft may refuse it, in time and without a change outside the folder."""
    counts["tried"] += 1
    signal.setitimer(signal.ITIMER_REAL, _seconds)
    try:
        yield
    except JaxftError as error:
        counts["refused"] += 1
        assert str(error).strip(), "a refusal without a word"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if _outside:
        raise Outside(", ".join(_outside))


def _refuse_changes_outside(folder: Path) -> None:
    allowed = (f"{folder.resolve()}{os.sep}", "/dev/null", "/dev/shm/")

    def check(event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        full = os.path.realpath(os.fsdecode(path))
        if not f"{full}{os.sep}".startswith(allowed[0]) and not full.startswith(allowed[1:]):
            _outside.append(f"{event} {full}")
            raise Outside(_outside[-1])

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & WRITING) if isinstance(flags, int) else bool(set(mode or "r") & set("wax+"))
            if writes and path is not None:
                check(event, path)
        elif event in CHANGES:
            for index in CHANGES[event]:
                check(event, arguments[index])
        elif event in FORBIDDEN:
            _outside.append(event)
            raise Outside(event)

    sys.addaudithook(hook)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"an input took more than {_seconds:g} seconds")


def main(function: str, folder: str, memory_mb: str, seconds_each: str) -> None:
    """The process of `run_limited`."""
    module, _, name = function.partition(":")
    target = getattr(importlib.import_module(module), name)
    own = importlib.import_module("fuzz.limits")  # this file, by the name under which the module imports it
    own._seconds = float(seconds_each)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + int(memory_mb) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, own._too_long)
    own._refuse_changes_outside(Path(folder))
    target()
    Path(folder, REPORT).write_text(json.dumps(own.counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
