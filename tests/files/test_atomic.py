"""Atomic writes: whatever interrupts one, the old content or the new is there, whole."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from jaxft.errors import CheckpointError
from jaxft.files import atomic
from jaxft.files.run_folder import read_json, write_json

KILLED_IN_A_FILE = """
import os, signal, sys
from jaxft.files.atomic import write_file

def fill(file):
    file.write(b"new, but cut o")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

write_file(sys.argv[1], fill)
"""
KILLED_IN_A_FOLDER = """
import os, signal, sys
from jaxft.files.atomic import new_folder

with new_folder(sys.argv[1]) as folder:
    (folder / "a").write_text("whole")
    (folder / "b").write_text("cut o")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run_killed(program, path):
    child = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert child.returncode == -signal.SIGKILL


def test_a_file_has_the_new_content_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "x.json"
    atomic.write_file(path, lambda file: file.write(b"old"))
    atomic.write_text(path, "new: ü\n")
    assert path.read_bytes() == b"new: \xc3\xbc\n"
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_kill_in_the_middle_of_a_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    run_killed(KILLED_IN_A_FILE, path)
    assert path.read_text() == "old"
    assert atomic.unfinished_file(path).read_text() == "new, but cut o"
    atomic.write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_middle_of_a_file_leaves_the_old_one_alone(tmp_path, error):
    path = tmp_path / "x.json"
    path.write_text("old")

    def fill(file):
        file.write(b"new, but cut o")
        raise error

    with pytest.raises(error):
        atomic.write_file(path, fill)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


def test_a_full_disk_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    ignored, limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            atomic.write_text(path, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


def recorded(monkeypatch):
    """What reaches the disk, in order: ("sync", name) and ("rename", name)."""
    events, fsync, replace = [], os.fsync, os.replace

    def sync(descriptor):
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def rename(source, target):
        events.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    return events


def test_the_bytes_of_a_file_reach_the_disk_before_its_name(tmp_path, monkeypatch):
    events = recorded(monkeypatch)
    atomic.write_text(tmp_path / "x.json", "new")
    assert events == [("sync", "x.json.jaxft.tmp"), ("rename", "x.json"), ("sync", tmp_path.name)]


def test_everything_in_a_folder_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    events = recorded(monkeypatch)
    with atomic.new_folder(tmp_path / "model") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("a")
        (folder / "b").write_text("b")
    before = events[: events.index(("rename", "model"))]
    assert before[0] == ("sync", tmp_path.name)  # the entry of the new folder
    assert sorted(before[1:]) == [("sync", "a"), ("sync", "b"), ("sync", "inner"), ("sync", "model.jaxft.partial")]
    assert events[len(before) :] == [("rename", "model"), ("sync", tmp_path.name)]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "parent" / "model"
    with atomic.new_folder(path) as folder:
        (folder / "a").write_text("a")
        assert not path.exists()
    assert os.listdir(path) == ["a"] and os.listdir(path.parent) == ["model"]


def test_a_kill_in_the_middle_of_a_folder_leaves_none_and_the_next_call_begins_anew(tmp_path):
    path = tmp_path / "model"
    run_killed(KILLED_IN_A_FOLDER, path)
    assert os.listdir(tmp_path) == ["model.jaxft.partial"]
    with atomic.new_folder(path) as folder:
        assert os.listdir(folder) == []
        (folder / "a").write_text("a")
    assert os.listdir(tmp_path) == ["model"] and os.listdir(path) == ["a"]


def test_what_others_call_partial_or_temporary_is_left_alone(tmp_path):
    theirs = {"model.partial/weights": "theirs", "x.json.tmp": "theirs"}
    for name, text in theirs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with atomic.new_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("a")
    atomic.write_text(tmp_path / "x.json", "new")
    assert {name: (tmp_path / name).read_text() for name in theirs} == theirs


def test_an_error_in_the_middle_of_a_folder_leaves_none(tmp_path):
    with pytest.raises(ValueError, match="no more"), atomic.new_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("a")
        raise ValueError("no more")
    assert os.listdir(tmp_path) == []


def test_a_folder_with_files_in_it_is_not_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    with pytest.raises(OSError, match="not empty"), atomic.new_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("a")
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model") == ["old"]


def test_json_of_a_run_folder_comes_back(tmp_path):
    assert read_json(tmp_path / "scores.json", {}) == {}
    write_json(tmp_path / "scores.json", {"metric": "accuracy", "text": "ü"})
    assert read_json(tmp_path / "scores.json") == {"metric": "accuracy", "text": "ü"}
    assert (tmp_path / "scores.json").read_text(encoding="utf-8").endswith('"text": "ü"\n}\n')


def test_json_of_a_run_folder_that_is_nested_too_deep_is_called_damaged(tmp_path):
    (tmp_path / "jaxft_run.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="damaged, and not valid JSON: it is nested deeper than 200 lists"):
        read_json(tmp_path / "jaxft_run.json")


@pytest.mark.parametrize("kind", ["link", "dangling link", "leftover"])
def test_a_file_is_made_anew_and_no_link_in_its_place_is_followed(tmp_path, kind):
    outside, path = tmp_path / "outside", tmp_path / "config.json"
    unfinished = atomic.unfinished_file(path)
    if kind != "dangling link":
        outside.write_text("mine")
    if kind == "leftover":
        unfinished.write_text("left")
    else:
        unfinished.symlink_to(outside)
        path.symlink_to(outside)
    atomic.write_text(path, "new")
    assert path.read_text() == "new" and not path.is_symlink() and not os.path.lexists(unfinished)
    assert not outside.exists() if kind == "dangling link" else outside.read_text() == "mine"
