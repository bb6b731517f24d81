"""How a process ends when another does. Here it is one that believes to be of two, with a store of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.errors import ExitCode

PROGRAM = """
import ctypes, os, sys, threading, time
import jax
from jaxft.errors import DataError
from jaxft.sharding import ending

class Store:
    told = {}
    def key_value_set(self, key, value):
        self.told[key] = value
    def key_value_dir_get(self, folder):
        return [item for item in self.told.items() if item[0].startswith(folder)]

me = int(sys.argv[2])
jax.process_count, jax.process_index = lambda: 2, lambda: me
ending.store, ending.is_multi_process = Store, lambda: True
ending.GRACE_SECONDS, ending.POLL_SECONDS = 0.3, 0.05

def explain(error):
    print("explained:", error, flush=True)
    return 2

with ending.end_on_peer_error(lambda text: os.write(1, (text + "\\n").encode()), explain):
    if sys.argv[1] == "abort":  # from a thread, as jax.distributed does, while the main thread waits
        threading.Thread(target=ctypes.CDLL(None).abort).start()
    elif sys.argv[1] == "told":
        Store.told["jaxft/failed/1"] = "DataError: no rows"
    elif sys.argv[1] == "error":
        raise DataError("no rows")
    elif sys.argv[1] == "lost":
        raise jax.errors.JaxRuntimeError("Gloo: Connection closed by peer")
    else:
        sys.argv[1] = "done"
    time.sleep(0 if sys.argv[1] == "done" else 60)
print("left", flush=True)
"""


def run(how: str, me: int) -> tuple[int, str]:
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how, str(me)],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("how", "me", "code", "lines"),
    [
        ("abort", 0, ExitCode.PEER_LOST, ["process 0 of 2 was aborted, most likely because another process died"]),
        ("told", 0, ExitCode.PEER_LOST, ["process 0 of 2 stops, because process 1 did: DataError: no rows"]),
        ("error", 1, 2, ["explained: no rows"]),
        ("lost", 1, ExitCode.PEER_LOST, ["explained: Gloo", "process 1 of 2 stops: it lost its connections"]),
        ("done", 1, 0, ["left"]),
    ],
)
def test_it_ends_with_its_code_and_says_why(how: str, me: int, code: int, lines: list[str]) -> None:
    found, said = run(how, me)
    assert found == code, said
    assert len(said.splitlines()) == len(lines), said
    assert all(line.startswith(start) for line, start in zip(said.splitlines(), lines, strict=True)), said
