"""Commands that write one folder: all but the first are refused, before anything is loaded."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxft import cli
from jaxft.config import with_overrides
from jaxft.errors import ConfigError, FolderInUseError
from jaxft.files.locks.lock import lock, owner_now
from jaxft.runs.folder import locked_run
from jaxft.runs.session.folders import SessionFolders

ROOT = Path(__file__).parents[2]
SMOKE = ["train", "--config=configs/quickstart.py:smoke", "--config.eval.metric=None", "--config.export.merged=False"]


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--model=absent", "--data=absent.jsonl", "--output=OUT/run"],
        ["quickstart", "--output_dir=OUT/run"],
        ["export", "--model=absent", "--to=OUT/run"],
        ["convert", "absent", "OUT/run"],
        ["sample", "--config=configs/quickstart.py:smoke", "--to=OUT/run"],
        ["score", "--model=absent", "--data=absent.jsonl", "--to=OUT/run"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_writes_is_refused_while_another_writes(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("jaxft.sharding.distributed.start", lambda *_, **__: None)  # JAX runs here already
    inside = command[0] in ("train", "quickstart")
    with lock(tmp_path / "run", "jaxft train", inside=inside):
        before = sorted(path.name for path in tmp_path.rglob("*"))
        assert cli.main([part.replace("OUT", str(tmp_path)) for part in command]) == 2
        message = capsys.readouterr().err
        assert f"run is being written by `jaxft train` on host {os.uname().nodename}, process {os.getpid()}" in message
        assert "Wait until it ends" in message and "absent" not in message
        assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_session_keeps_others_from_its_folder_until_it_is_deleted(tmp_path):
    config = with_overrides({"output_dir": str(tmp_path / "run"), "model.path": "m", "data.train": "rows.jsonl"})
    folders = SessionFolders()
    folders.open(tmp_path / "run", config, {}, None)
    folders.open(tmp_path / "run", config, {}, None)
    assert owner_now(tmp_path / "run", inside=True).what == "jaxft.Session"
    again = SessionFolders()  # of the same process
    again.open(tmp_path / "run", config, {}, None)
    del folders
    assert owner_now(tmp_path / "run", inside=True) is not None
    del again
    assert owner_now(tmp_path / "run", inside=True) is None
    with lock(tmp_path / "run", "jaxft train", inside=True), pytest.raises(FolderInUseError, match="`jaxft train`"):
        SessionFolders().open(tmp_path / "run", config, {}, None)


def test_a_folder_of_others_gets_no_lock(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="is not empty and holds no run"), locked_run(tmp_path, "jaxft train"):
        pass
    assert os.listdir(tmp_path) == ["config.json"]


def start(folder: Path, *more: str) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-m", "jaxft.cli", *SMOKE, f"--output_dir={folder}", *more],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_of_many_runs_in_one_folder_one_trains(tmp_path):
    settings = ("--train.steps=60", "--checkpoint.every=5", "--train.log_every=1")
    runs = [start(tmp_path / "run", *settings) for _ in range(3)]
    time.sleep(3)
    runs += [start(tmp_path / "run", *settings) for _ in range(2)]
    texts = [process.communicate(timeout=600)[0] for process in runs]
    codes = [process.returncode for process in runs]
    assert sorted(codes) == [0, 2, 2, 2, 2], texts
    assert all("is being written by `jaxft train`" in text for text, code in zip(texts, codes, strict=True) if code)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 61)) and len([s for s in steps if steps.count(s) > 2]) == 0
    assert not (tmp_path / "run" / "jaxft_lock.json").exists()


@pytest.mark.slow
def test_a_killed_run_locks_nothing(tmp_path):
    first = start(tmp_path / "run", "--train.steps=2000")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    assert owner_now(tmp_path / "run", inside=True).pid == first.pid
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (tmp_path / "run" / "jaxft_lock.json").exists() and owner_now(tmp_path / "run", inside=True) is None
    second = start(tmp_path / "run", "--train.steps=2000")
    while owner_now(tmp_path / "run", inside=True) is None:
        assert second.poll() is None, second.communicate()[0]
        time.sleep(0.1)
    second.kill()
    second.communicate()


@pytest.mark.slow
def test_a_second_group_of_processes_is_refused(tmp_path):
    def group() -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        flags = ("--train.steps=60", f"--coordinator={address}", "--num_processes=2")
        return [start(tmp_path / "run", *flags, f"--process_id={number}") for number in range(2)]

    first = group()
    while owner_now(tmp_path / "run", inside=True) is None:
        assert first[0].poll() is None, first[0].communicate()[0]
        time.sleep(0.1)
    second = group()
    texts = [process.communicate(timeout=300)[0] for process in second]
    assert [process.returncode for process in second] == [2, 2], texts
    assert all(f"is being written by `jaxft train` on host {os.uname().nodename}" in text for text in texts)
    texts = [process.communicate(timeout=300)[0] for process in first]
    assert [process.returncode for process in first] == [0, 0], texts
