"""Servers that accept and never answer, and that stop in the middle: an end within a stated time, for every reader."""

import socket
import threading
import time

import pytest

from jaxft.data.sources.text import bytes_of
from jaxft.errors import CheckpointError, DataError
from jaxft.files import deadlines
from jaxft.files.deadlines import TimedFile, repeated, within
from jaxft.files.digest import content_digest
from jaxft.files.paths import open_folder


@pytest.fixture
def silent():
    """The port of a server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(deadlines, "READ_SECONDS", 0.1)
    monkeypatch.setattr(deadlines, "PAUSE_SECONDS", 0.01)


def test_a_server_that_never_answers_is_given_up_by_every_reader(silent):
    pytest.importorskip("fsspec")
    address = f"ftp://127.0.0.1:{silent}/model"  # the one remote file system that needs no package
    start = time.monotonic()
    for read, error in (
        (lambda: open_folder(address).names(), CheckpointError),
        (lambda: content_digest(address), CheckpointError),
        (lambda: bytes_of(f"{address}/rows.jsonl"), DataError),
    ):
        with pytest.raises(error, match="ftp://127.0.0.1.*no answer within 0 s, 3 times, so the server or the network"):
            read()
    assert time.monotonic() - start < 10


class StopsInTheMiddle:
    """A file whose first read is answered, and no later one."""

    def __init__(self):
        self.reads, self.closed = 0, False

    def read(self, size=-1):
        self.reads += 1
        if self.reads > 1:
            threading.Event().wait()
        return b"half"

    def close(self):
        self.closed = True


def test_a_file_that_stops_in_the_middle_is_given_up():
    with TimedFile(StopsInTheMiddle()) as file:
        assert file.read(4) == b"half"
        with pytest.raises(TimeoutError, match="no answer within"):
            file.read(4)
    assert file.closed


def test_what_fails_for_a_moment_is_tried_again_and_other_errors_are_not():
    calls = []

    def action():
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionResetError("reset")
        return "answer"

    assert repeated(action) == "answer" and len(calls) == 3

    def refused():
        calls.append(1)
        raise PermissionError("no")

    with pytest.raises(PermissionError):
        repeated(refused)
    assert len(calls) == 4


def test_an_interruption_of_the_thread_is_raised_where_it_was_asked_for():
    with pytest.raises(KeyError, match="x"):
        within(lambda: {}["x"])
