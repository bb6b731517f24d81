"""Servers that are killed, refused or stopped, with a stand-in for workers."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import (
    QUICK,
    ServerProcess,
    create,
    in_thread,
    messages,
    rows,
    settings_of,
    until,
    upload,
    wait_for,
)

from jaxft import cli
from jaxft.assets import ASSETS
from jaxft.errors import FolderInUseError, JaxftError
from jaxft.serving.serve import serve
from jaxft.serving.storage.database import Database, StateError
from jaxft.serving.storage.state import open_state
from jaxft.serving.supervision import processes

MODEL = str(ASSETS / "smoke")


def progress(client: openai.OpenAI, id: str) -> int:
    return (client.fine_tuning.jobs.retrieve(id).jaxft["progress"] or {}).get("step", 0)


def lock_of(tmp_path: Path, job: Any) -> Path:
    return tmp_path / "state" / "jobs" / job.id / "lock"


def numbers(client: openai.OpenAI, id: str) -> list[str]:
    return [text for text in messages(client, id) if text.startswith("Step")]


def expected(steps: int) -> list[str]:
    return [f"Step {step}/{steps}: training loss={1 / step:.4f}" for step in range(1, steps + 1)]


def test_a_killed_server_is_followed_by_one_that_adopts_its_job(tmp_path):
    first = ServerProcess(tmp_path / "state", MODEL)
    client = first.running.client()
    job = create(client, rows(steps=15, wait=5, epoch=10))
    waiting = create(client, rows(steps=2))
    half = client.uploads.create(bytes=9, filename="a", mime_type="text/jsonl", purpose="fine-tune")
    wait_for(lambda: progress(client, job.id) == 5, "step 5")
    until(client, waiting.id, "queued")
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    assert processes.is_alive(lock_of(tmp_path, job))
    (tmp_path / "state" / "files" / "file-unknown").write_text("of no row")
    (tmp_path / "state" / "jobs" / "ftjob-unknown").mkdir()
    second = ServerProcess(tmp_path / "state", MODEL)
    client = second.running.client()
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    lock_of(tmp_path, job).with_name("go").touch()
    assert client.uploads.parts.create(half.id, data=b"abc").upload_id == half.id
    assert until(client, job.id, "succeeded").jaxft["deaths"] == 0 and numbers(client, job.id) == expected(15)
    until(client, waiting.id, "succeeded")
    assert not (tmp_path / "state" / "files" / "file-unknown").exists()
    assert not (tmp_path / "state" / "jobs" / "ftjob-unknown").exists()
    # Server and worker are killed: the next server starts the worker again.
    job = create(client, rows(steps=15, wait=12, epoch=10))
    wait_for(lambda: progress(client, job.id) == 12, "step 12")
    assert second.end(signal.SIGKILL) == -signal.SIGKILL
    assert processes.send(lock_of(tmp_path, job), signal.SIGKILL, group=True)
    lock_of(tmp_path, job).with_name("go").touch()
    third = ServerProcess(tmp_path / "state", MODEL)
    client = third.running.client()
    assert until(client, job.id, "succeeded").jaxft["deaths"] == 1 and numbers(client, job.id) == expected(15)
    # SIGTERM: the worker saves, and the job goes on at the next start.
    job = create(client, rows(steps=5, wait=3))
    wait_for(lambda: progress(client, job.id) == 3, "step 3")
    assert third.end(signal.SIGTERM) == 0
    with in_thread(tmp_path / "state", MODEL) as running:
        client = running.client()
        assert until(client, job.id, "succeeded").jaxft["deaths"] == 0 and numbers(client, job.id) == expected(5)
        assert any("the job is queued again" in text for text in messages(client, job.id))


def test_a_cut_power_leaves_states_and_files_that_agree(tmp_path):
    state = tmp_path / "state"
    with in_thread(state, MODEL) as running:
        client = running.client()
        kept, lost = upload(client, rows()), upload(client, rows())
        job = until(client, create(client, rows(epoch=2)).id, "succeeded")
    (state / "files" / lost).unlink()
    (state / "models" / f"{job.id}-2" / "adapter_config.json").unlink()
    (state / "models" / f"{job.id}-2").rmdir()
    (state / "models" / "ftjob-none-7").mkdir()
    with in_thread(state, MODEL) as running:
        client = running.client()
        assert client.files.content(kept).read() == rows()
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(lost)
        assert [one.step_number for one in client.fine_tuning.jobs.checkpoints.list(job.id)] == [4]
    assert not (state / "models" / "ftjob-none-7").exists()


def test_a_second_server_on_the_state_is_refused(tmp_path, capsys):
    state = tmp_path / "state"
    with in_thread(state, MODEL), pytest.raises(FolderInUseError, match=f"jaxft serve.*process {os.getpid()}"):
        serve(settings_of(state, MODEL), print)


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(StateError, match=r"holds something else \(thesis.txt\)"), open_state(tmp_path / "other"):
        pass
    (tmp_path / "foreign").mkdir()
    with sqlite3.connect(tmp_path / "foreign" / "state.sqlite3") as connection:
        connection.execute("CREATE TABLE mine (a)")
    with pytest.raises(StateError, match="database of another program"), open_state(tmp_path / "foreign"):
        pass
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.sqlite3").write_bytes(b"no database" * 1000)
    with pytest.raises(StateError, match="cannot be used as the database"), open_state(tmp_path / "damaged"):
        pass
    with open_state(tmp_path / "newer") as state, state.db.write() as connection:
        connection.execute("PRAGMA user_version=99")
    with pytest.raises(StateError, match="newer jaxft"), open_state(tmp_path / "newer"):
        pass


def test_a_network_file_system_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxft.serving.storage.state.is_of_one_machine", lambda folder: False)
    with pytest.raises(StateError, match="network file system"), open_state(tmp_path / "state"):
        pass


def test_a_transaction_that_fails_writes_nothing(tmp_path):
    with open_state(tmp_path / "state") as state:
        with pytest.raises(ZeroDivisionError), state.db.write() as connection:
            connection.execute("INSERT INTO keys VALUES ('a', 'a', 'a', 'train', 1, NULL, NULL)")
            raise ZeroDivisionError
        assert state.db.all("SELECT * FROM keys") == [] and state.db.changes == 0


def test_a_full_disk_under_the_database_is_told_and_the_server_lives(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(Database, "_open", lambda self, path: (opened.append(self), OPEN(self, path)))
    with in_thread(tmp_path / "state", MODEL) as running:
        client = running.client()
        file = upload(client, rows())
        database = opened[-1]
        pages = database.one("PRAGMA page_count")[0]
        database.one(f"PRAGMA max_page_count={pages}")
        metadata = {str(n): "x" * 512 for n in range(16)}
        with pytest.raises(openai.BadRequestError) as refused:
            for _ in range(200):
                client.fine_tuning.jobs.create(
                    model="tiny", training_file=file, metadata=metadata, extra_body={"jaxft": {"start": False}}
                )
        assert refused.value.code == "insufficient_storage"
        database.one("PRAGMA max_page_count=1000000")
        until(client, create(client, rows()).id, "succeeded")


OPEN = Database._open


def test_the_server_imports_no_jax():
    code = "import sys, jaxft.cli, jaxft.serving.serve; sys.exit('jax' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs a model"),
        (["--model=tiny"], "must be NAME=PATH"),
        (["--model=a:b=/tmp"], "cannot be the name"),
        (["--model=ft:x=/tmp"], "cannot be the name"),
        (["--model=tiny=/nowhere/at/all"], "there is no"),
        ([f"--model=a={MODEL}", f"--model=a={MODEL}"], "two models have the name"),
        ([f"--model=a={MODEL}", "--host=0.0.0.0"], "in the clear"),
        ([f"--model=a={MODEL}", "--tls_cert=x"], "belong to each other"),
        ([f"--model=a={MODEL}", "--train.batch_sice=2"], "Did you mean 'train.batch_size'"),
    ],
)
def test_settings_that_are_refused(options, message, tmp_path, capsys):
    assert cli.main(["serve", f"--state={tmp_path / 'state'}", *options]) == 2
    assert message in capsys.readouterr().err


def test_an_address_that_is_taken(tmp_path):
    with in_thread(tmp_path / "one", MODEL) as running:
        settings = settings_of(tmp_path / "two", MODEL)
        taken = type(settings)(**{**settings.__dict__, "port": running.port})
        with pytest.raises(JaxftError, match="cannot be used"):
            serve(taken, print)


def test_a_silent_worker_is_ended(tmp_path):
    limits = type(QUICK)(**{**QUICK.__dict__, "silence": 1.0})
    with in_thread(tmp_path / "state", MODEL, limits) as running:
        client = running.client()
        job = until(client, create(client, rows(pause=1000)).id, "failed")
        assert job.error.code == "worker_died"
