"""Reward functions that ship with jaxft. Each compares the answers with a column of the rows."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from jaxft.data.chat.reasoning import split_thoughts
from jaxft.errors import ConfigError
from jaxft.evaluation.scoring import score

CPU_SECONDS, MEMORY_BYTES, FILE_BYTES = 10, 1 << 30, 1 << 20
# What the process of `python_tests` runs. On Linux it asks for namespaces of users and of networks of its own
# (CLONE_NEWUSER | CLONE_NEWNET), which may be refused, and dies with the process that started it (PR_SET_PDEATHSIG).
PROGRAM = """
import ctypes, json, os, resource, sys
if sys.platform == "linux":
    system = ctypes.CDLL(None)
    system.unshare(0x10000000 | 0x40000000)
    system.prctl(1, 9)
given = json.load(sys.stdin)
for name, limit in given["limits"].items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
names = {"__name__": "__main__"}
try:
    for part in ("code", "test"):
        exec(compile(given[part], part, "exec"), names)
except BaseException:
    os._exit(1)
os._exit(given["done"])
"""


def exact_match(completions: Sequence[Any], reference: Sequence[str], **_: Any) -> list[float]:
    """1 if the answer is the reference, without white space around both and without thoughts, else 0."""
    return _by_metric("exact_match", completions, reference)


def json_valid(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 if the answer is one strict JSON value, else 0."""
    return _by_metric("json_valid", completions, [""] * len(completions))


def json_exact(completions: Sequence[Any], reference: Sequence[str], **_: Any) -> list[float]:
    """1 if the answer is strict JSON equal to that of the reference, else 0."""
    return _by_metric("json_exact", completions, reference)


def math_answer(completions: Sequence[Any], reference: Sequence[str], **_: Any) -> list[float | None]:
    """1 if the answer's last mathematical expression equals that of the reference, else 0; by the library math-verify.

    None if the reference holds no expression that the library can read.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError("math_answer needs math-verify: pip install 'jaxft[math]'") from error
    rewards: list[float | None] = []
    for completion, right in zip(completions, reference, strict=True):
        # Its own time limits need signals of a main thread; the deadline of the call is enough.
        gold = parse(right, parsing_timeout=None)
        answer = parse(text_of(completion), parsing_timeout=None)
        rewards.append(float(verify(gold, answer, timeout_seconds=None)) if gold else None)
    return rewards


def python_tests(completions: Sequence[Any], tests: Sequence[str], **_: Any) -> list[float]:
    """1 if the Python code of the answer and then the row's tests run to their end without an error, else 0.

    The code is what stands in the answer's last fenced block, or all of it. It runs in a process with limits on
    processor time, memory and the size of files, in an empty folder, without the environment of the run, and without a
    network if Linux lets an ordinary process give it up. This stops code that is wrong, and not code that attacks: it
    can read files as the run can, and change the tests' functions. Code that ends the process fails, whatever its exit
    code.
    """
    return [float(_passes(code_of(text_of(one)), test)) for one, test in zip(completions, tests, strict=True)]


def text_of(completion: Any) -> str:
    """The text of a completion, which may be a list of messages, without thoughts."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return split_thoughts(text)[1]


def code_of(text: str) -> str:
    """The last fenced block of a text, without the name of its language; the whole text if it has none."""
    parts = text.split("```")
    if len(parts) < 3:
        return text
    block = parts[len(parts) // 2 * 2 - 1]
    first, _, rest = block.partition("\n")
    return rest if first.strip().isalnum() or not first.strip() else block


def _by_metric(metric: str, completions: Sequence[Any], references: Sequence[str]) -> list[float]:
    return [float(passed) for passed in score(metric, [text_of(one) for one in completions], references).per_row]


def _passes(code: str, test: str) -> bool:
    limits = {"CPU": CPU_SECONDS, "AS": MEMORY_BYTES, "FSIZE": FILE_BYTES, "CORE": 0}
    # The exit code of tests that came to their end, which code that only leaves early does not know.
    done = 64 + secrets.randbelow(64)
    given = {"code": code, "test": test, "limits": limits, "done": done}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", PROGRAM],
            cwd=folder,
            env={"PATH": os.environ.get("PATH", "")},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(given).encode(), timeout=2 * CPU_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            # With the processes that the code started.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode == done
