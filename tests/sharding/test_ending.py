"""How a process ends when another does. Processes are linked by sockets; one of them is a real process."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxft.errors import ExitCode
from jaxft.sharding.links import Connection, Links, Loss

PROGRAM = """
import ctypes, os, socket, sys, threading, time
from jaxft.errors import CheckpointError, DataError
from jaxft.sharding import ending
from jaxft.sharding.links import Connection, Links, set_current

how, me, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ending.GRACE_SECONDS, ending.NEWS_SECONDS, ending.ABORT_SECONDS = 0.3, 1.0, 0.5
peer = Connection(socket.socket(fileno=number))
set_current(Links(me, {1 - me: peer}, {0: "here", 1: "there"}, 100, ending.end_with))
ending.watch_aborts()

def explain(error):
    print("explained:", error, flush=True)
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, DataError) else 1

with ending.end_on_peer_error(lambda text: os.write(1, (text + "\\n").encode()), explain):
    os.write(1, b"ready\\n")
    if how == "abort":  # from a thread, as jax.distributed does, while the main thread waits
        threading.Thread(target=ctypes.CDLL(None).abort).start()
    elif how == "error":
        raise DataError("no rows")
    elif how == "interrupted":
        raise KeyboardInterrupt
    elif how == "library":
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    elif how == "save":
        raise CheckpointError("step 4 was not saved") from ValueError("UNKNOWN: Gloo failed: Connection reset")
    elif how == "late":  # as JAX does if processes need longer than 30 s to meet
        raise RuntimeError("UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: 1 of 2")
    time.sleep(0 if how == "done" else 60)
print("left", flush=True)
"""
GONE = "process 0 of 2 stops, because process 1 (on there) is gone: it was killed"


class Peer:
    """The other end of the connection of a real process."""

    def __init__(self, how: str, me: int = 0) -> None:
        self.end, other = socket.socketpair()
        self.connection = Connection(self.end)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, how, str(me), str(other.fileno())],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=(other.fileno(),),
        )
        other.close()
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def result(self) -> tuple[int, list[str]]:
        assert self.process.stdout is not None
        output = self.process.stdout.read()  # not `communicate`, which would lose what came with the first line
        return self.process.wait(), output.splitlines()


def tell(peer: Peer, reason: str) -> None:
    peer.connection.send({"loss": {"process": 1, "reason": reason, "reported": True}})


@pytest.mark.parametrize("how", ["wait", "library", "save", "abort"])
def test_a_process_that_is_gone_ends_the_others_whatever_the_library_says(how: str) -> None:
    peer = Peer(how)
    peer.end.close()
    code, lines = peer.result()
    assert code == ExitCode.PEER_LOST and len(lines) == 1 and lines[0].startswith(GONE), lines


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("did: DataError: no rows", "because process 1 did: DataError: no rows"),
        ("was interrupted", "because process 1 was interrupted. The same command goes on from the newest checkpoint."),
    ],
)
def test_what_another_process_reported_is_repeated(reason: str, line: str) -> None:
    peer = Peer("wait")
    tell(peer, reason)
    code, lines = peer.result()
    assert (code, lines) == (ExitCode.PEER_LOST, [f"process 0 of 2 stops, {line}"])


@pytest.mark.parametrize(
    ("how", "code", "first", "told"),
    [
        ("error", ExitCode.REFUSED, "explained: no rows", "did: DataError: no rows"),
        ("interrupted", ExitCode.INTERRUPTED, "explained: ", "was interrupted"),
        ("save", ExitCode.FAILED, "explained: step 4 was not saved", "did: CheckpointError: step 4"),
        ("library", ExitCode.FAILED, "explained: UNKNOWN: Gloo", "did: ValueError: UNKNOWN: Gloo"),
        (
            "late",
            ExitCode.PEER_LOST,
            "process 1 of 2 stops, because another process came too late to a computation of all, although none has",
            "did: RuntimeError: UNKNOWN: Gloo context",
        ),
        ("abort", ExitCode.FAILED, "process 1 of 2 was aborted by a library", "was aborted by a library"),
    ],
)
def test_an_error_while_all_are_there_is_its_own_and_is_told(how: str, code: int, first: str, told: str) -> None:
    peer = Peer(how, me=1)
    found, lines = peer.result()
    assert found == code and len(lines) == 1 and lines[0].startswith(first), lines
    messages = peer.connection.receive() or []
    (loss,) = (message["loss"] for message in messages if "loss" in message)
    assert loss["process"] == 1 and loss["reported"] and loss["reason"].startswith(told)


def test_a_process_that_is_done_ends_as_usual_and_says_so() -> None:
    peer = Peer("done", me=1)
    assert peer.result() == (0, ["left"])
    assert {"done": 1} in (peer.connection.receive() or [])


def test_process_0_tells_all_others_who_is_gone() -> None:
    ends = {number: socket.socketpair() for number in (1, 2, 3)}
    losses: list[Loss] = []
    hosts = {number: f"host-{number}" for number in range(4)}
    hub = Links(0, {number: Connection(own) for number, (own, _) in ends.items()}, hosts, 100, losses.append)
    others = {number: Links(number, {0: Connection(ends[number][1])}, hosts, 100, losses.append) for number in (1, 3)}
    ends[2][1].close()
    seen = [links.wait(10.0) for links in (hub, *others.values())]
    assert all(loss is not None and loss.process == 2 and "(on host-2) is gone" in loss.reason for loss in seen)
    until = time.monotonic() + 10
    while len(losses) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(losses) == 3


def test_a_process_that_has_done_its_part_may_go() -> None:
    own, other = socket.socketpair()
    hub = Links(0, {1: Connection(own)}, {0: "a", 1: "b"}, 100, lambda loss: None)
    peer = Connection(other)
    peer.send({"done": 1})
    peer.close()
    assert hub.wait(0.3) is None


def test_a_process_without_a_sign_of_life_is_named() -> None:
    own, other = socket.socketpair()
    connection = Connection(own)
    hub = Links(0, {1: connection}, {0: "a", 1: "b"}, 100, lambda loss: None)
    assert hub.silent() is None
    connection.heard -= 60
    loss = hub.silent()
    assert loss is not None and loss.process == 1 and "gave no sign of life for 60 s" in loss.reason
    other.close()
