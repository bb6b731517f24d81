"""The power is cut: what the server has answered is on the disk, and what its rows name is there.

A model of a disk that forgets shows the order of writes at every moment. The slow test cuts a real file system.
"""

import itertools
import json
import random
import shutil
import signal
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from oracles.forgetful_disk import ForgetfulDisk
from runs.test_power_cuts import cut, make_image, mounted
from servers import MODEL, ServerProcess, create, in_thread, messages, rows, until, upload, wait_for

from jaxft.assets import ASSETS
from jaxft.files.atomic import new_folder
from jaxft.serving.jobs.folder import JobFolder
from jaxft.serving.storage.database import Database
from jaxft.serving.storage.events import add_event
from jaxft.serving.storage.jobs import job_of
from jaxft.serving.storage.models import take_export
from jaxft.serving.storage.state import State
from jaxft.serving.supervision.reading import read_worker
from jaxft.serving.supervision.watch import Watch

SMOKE = str(ASSETS / "smoke")
CUTS = 8


def named(state: Path) -> set[tuple[str, str, int]]:
    """What the database says is there: (kind, the path of a file below the state, its bytes or -1).

    Of models, that of step 2: the last one is flushed by another process, whose calls are not seen here.
    """
    with sqlite3.connect(state / "state.sqlite3") as connection:
        files = connection.execute("SELECT id, bytes FROM files WHERE deleted = 0").fetchall()
        sql = (
            "SELECT p.id, p.upload_id, p.bytes FROM parts p JOIN uploads u ON u.id = upload_id WHERE status = 'pending'"
        )
        parts = connection.execute(sql).fetchall()
        jobs = connection.execute("SELECT id, status FROM jobs").fetchall()
        models = connection.execute("SELECT folder FROM models WHERE deleted = 0 AND step = 2").fetchall()
    connection.close()
    out = {("file", f"files/{id}", size) for id, size in files}
    out |= {("part", f"uploads/{upload}/{id}", size) for id, upload, size in parts}
    out |= {("job", f"jobs/{id}/job.json", -1) for id, status in jobs}
    out |= {("rows", f"jobs/{id}/training.jsonl", -1) for id, status in jobs if status == "paused"}
    return out | {("model", f"models/{folder}/adapter_config.json", -1) for (folder,) in models}


def test_rows_come_after_what_they_name(tmp_path, monkeypatch):
    """Before a row is written, its files are flushed: at no moment may a cut leave a row without them."""
    known, seen, lost, lock = set[tuple[str, str, int]](), set[str](), list[str](), threading.Lock()

    def check(disk: ForgetfulDisk) -> None:
        nonlocal known
        now = named(disk.root)
        for image in disk.images(4):
            for kind, path, size in known & now:  # of rows that were there before this moment, and still are
                left = image.get(path)
                if left is None or size not in (-1, len(left)):
                    lost.append(
                        f"{path}: {size} bytes, of which a cut would leave {left if left is None else len(left)}"
                    )
                seen.add(kind)
        known = now

    with in_thread(tmp_path / "state", SMOKE) as running:
        disk = ForgetfulDisk(tmp_path / "state", check)
        moment = disk._moment
        monkeypatch.setattr(
            disk, "_moment", lambda: with_lock(lock, moment)
        )  # requests are answered by several threads
        disk.watch(monkeypatch)
        client = running.client()
        file = upload(client, rows())
        disk.end()
        begun = client.uploads.create(bytes=6, filename="a", mime_type="text/jsonl", purpose="fine-tune")
        parts = [client.uploads.parts.create(begun.id, data=text).id for text in (b"abc", b"def")]
        disk.end()
        client.uploads.complete(begun.id, part_ids=parts)
        disk.end()
        waits = {"jaxft": {"start": False}}
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=file, extra_body=waits)
        disk.end()
        until(client, job.id, "paused")
        disk.end()
        state = State(running.state, Database(running.state / "state.sqlite3"))
        pragmas = {name: state.db.one(f"PRAGMA {name}")[0] for name in ("journal_mode", "synchronous", "foreign_keys")}
        assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}, "2 is FULL: commits are flushed"
        with new_folder(tmp_path / "state" / "jobs" / job.id / "exports" / "step-2") as export:
            (export / "adapter_config.json").write_text("{}")
        source = JobFolder(running.state / "jobs" / job.id).exports / "step-2"
        assert take_export(state, job_of(state, job.id), 2, source, final=False, metrics={})
        disk.end()
        state.db.close()
        client.fine_tuning.jobs.resume(job.id)
        job = until(client, job.id, "succeeded")
        disk.end()
        assert len(job.result_files) == 2
    assert lost == [] and disk.cuts > 20 and seen == {"file", "part", "job", "rows", "model"}


def with_lock(lock: threading.Lock, call: Any) -> None:
    with lock:
        call()


def test_a_lost_folder_and_torn_lines_stop_no_other_job(tmp_path):
    state = tmp_path / "state"
    with in_thread(state, SMOKE) as running:
        client = running.client()
        lost, torn = (create(client, rows(steps=4, epoch=2), extra_body={"jaxft": {"start": False}}) for _ in range(2))
        for job in (lost, torn):
            until(client, job.id, "paused")
    shutil.rmtree(state / "jobs" / lost.id)
    folder = JobFolder(state / "jobs" / torn.id)
    whole = folder.events.read_bytes()
    folder.events.write_bytes(whole + b'{"kind": "star' + bytes(20))
    # A checkpoint was exported, and the word of it is lost.
    with new_folder(folder.exports / "step-1") as export:
        (export / "adapter_config.json").write_text("{}")
    with in_thread(state, SMOKE) as running:
        client = running.client()
        failed = client.fine_tuning.jobs.retrieve(lost.id)
        assert (failed.status, failed.error.code) == (
            "failed",
            "job_lost",
        ) and "Create the job again" in failed.error.message
        client.fine_tuning.jobs.resume(torn.id)
        until(client, torn.id, "succeeded")
        said = messages(client, torn.id)
        assert said.count("Fine-tuning job started") == 1 and said.count("Files validated") == 1
        assert [one.step_number for one in client.fine_tuning.jobs.checkpoints.list(torn.id)] == [4, 2, 1]


def test_what_a_full_disk_kept_from_the_database_is_entered_later(tmp_path, monkeypatch):
    with in_thread(tmp_path / "state", SMOKE) as running:
        job = until(running.client(), create(running.client(), rows(steps=3)).id, "succeeded")
    state = State(tmp_path / "state", Database(tmp_path / "state" / "state.sqlite3"))
    before = [
        row["kind"] for row in state.db.all("SELECT kind FROM events WHERE kind IN ('started', 'metrics') ORDER BY n")
    ]
    with state.db.write() as connection:
        connection.execute("DELETE FROM events")
    watch, calls = Watch(JobFolder(state.jobs / job.id)), itertools.count()

    def full(*arguments: Any) -> bool:
        if next(calls) == 3:
            raise sqlite3.OperationalError("database or disk is full")
        return add_event(*arguments)

    monkeypatch.setattr("jaxft.serving.supervision.reading.add_event", full)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        read_worker(state, job.id, watch)
    assert state.db.all("SELECT * FROM events") == []
    read_worker(state, job.id, watch)
    after = [
        row["kind"] for row in state.db.all("SELECT kind FROM events WHERE kind IN ('started', 'metrics') ORDER BY n")
    ]
    assert after == before == ["started", *["metrics"] * 3]
    state.db.close()


@pytest.mark.slow
def test_the_power_is_cut_while_a_server_works(tmp_path):
    image, chance, done = tmp_path / "disk.ext4", random.Random(3), 0
    make_image("ext4", image, size=512)  # of which uploads leave 256 free
    with mounted(image, tmp_path / "disk"):
        server = ServerProcess(tmp_path / "disk" / "state", SMOKE)
        client = server.running.client()
        files: dict[str, bytes] = {}
        jobs: list[str] = []
        try:
            for number in range(CUTS):
                content = rows(steps=6, epoch=2, pause=0.05, number=number)
                files[id := upload(client, content)] = content
                jobs.append(client.fine_tuning.jobs.create(model=MODEL, training_file=id).id)
                time.sleep(chance.uniform(0, 0.6))
                models = [one.id for one in client.models.list()]
                cut(server.process, image, tmp_path / "copy.ext4")
                with mounted(tmp_path / "copy.ext4", tmp_path / "copy"):
                    shutil.rmtree(tmp_path / "again", ignore_errors=True)
                    shutil.copytree(tmp_path / "copy" / "state", tmp_path / "again" / "state", symlinks=True)
                shutil.copy(tmp_path / "disk" / "state.key", tmp_path / "again" / "state.key")
                check_after_cut(tmp_path / "again" / "state", files, jobs, models)
                done += 1
        finally:
            server.end(signal.SIGKILL)
            wait_for(lambda: not working(tmp_path / "disk" / "state", jobs), "the end of the worker")
    assert done == CUTS


def working(state: Path, jobs: list[str]) -> list[str]:
    """The jobs whose worker lives; it is ended."""
    from jaxft.serving.supervision import processes

    for job in jobs:
        processes.send(state / "jobs" / job / "lock", signal.SIGKILL, group=True)
    return [job for job in jobs if processes.is_alive(state / "jobs" / job / "lock")]


def check_after_cut(state: Path, files: dict[str, bytes], jobs: list[str], models: list[str]) -> None:
    """The newest server finds what was answered before the cut, and its jobs end as if there had been none."""
    with in_thread(state, SMOKE) as running:
        client = running.client()
        for id, content in files.items():
            assert client.files.content(id).read() == content
        assert set(models) <= {one.id for one in client.models.list()}
        for row in client.models.list():
            assert row.id == MODEL or json.loads(folder_of(state, row.id).joinpath("adapter_config.json").read_text())
        for id in jobs:
            job = until(client, id, "succeeded")
            numbers = [text for text in messages(client, id) if text.startswith("Step")]
            assert len(numbers) == len(set(numbers)) == 6 and job.trained_tokens == 6
            assert [one.step_number for one in client.fine_tuning.jobs.checkpoints.list(id)] == [6, 4, 2]


def folder_of(state: Path, model: str) -> Path:
    with sqlite3.connect(state / "state.sqlite3") as connection:
        (folder,) = connection.execute("SELECT folder FROM models WHERE id = ?", (model,)).fetchone()
    connection.close()
    return state / "models" / str(folder)
