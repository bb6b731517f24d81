"""Folders in a bucket on this machine that fails: objects, leases and working copies."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import fsspec
import pytest
from bucket_server import Fault, serving, times

from jaxft.checkpoint.steps.bucket_objects import Objects
from jaxft.errors import BucketError, CheckpointError, ConfigError, FolderInUseError
from jaxft.files.buckets import gcs, store, working_copy
from jaxft.files.buckets.lease import Lease, owner_now
from jaxft.files.buckets.scratch import Scratch
from jaxft.files.buckets.store import Bucket, Changed, Entry
from jaxft.files.buckets.working_copy import (
    address_of,
    empty_folder_of,
    fetch,
    folder_of,
    forget,
    shown,
    stage,
    written,
)
from jaxft.files.locks import lock
from jaxft.files.locks.owner import Owner, running_kernel
from jaxft.files.paths import url_parts
from jaxft.files.run_folder import LOCK, MARK, UNFINISHED
from jaxft.runs.folder import locked_run
from jaxft.runs.identity import exports
from jaxft.runs.survey.listing import runs_below


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture
def bucket(server, request, monkeypatch):
    gcsfs_retry = pytest.importorskip("gcsfs.retry")
    monkeypatch.setattr(gcsfs_retry, "asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0)))
    monkeypatch.setattr(store, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.01)
    gcsfs_retry_name = re.sub(r"\W+", "_", request.node.name)
    return Bucket(f"gs://bucket/{gcsfs_retry_name}")


FAULTS = {
    "429": Fault(status=429), "500": Fault(status=500), "502": Fault(status=502), "503": Fault(status=503),
    "504": Fault(status=504), "closed before": Fault(cut="before"), "closed after": Fault(cut="after"),
    "closed in the answer": Fault(cut="middle"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_fails_for_a_time_loses_nothing(bucket, server, tmp_path, fault):
    (tmp_path / "file").write_bytes(b"of a file")
    where = server.names
    for count in (1, 8):  # more often than gcsfs tries, too
        with server.failing(times(count, FAULTS[fault], lambda asked: True)):
            bucket.write("small", b"of a text")
            bucket.upload("file", tmp_path / "file")
            assert bucket.read("small").data == b"of a text"
            bucket.download("file", tmp_path / "again", 9)
            assert set(bucket.entries()) == {"small", "file"}
            bucket.delete("small")
    assert (tmp_path / "again").read_bytes() == b"of a file"
    assert [name for name in where("bucket") if name.startswith(bucket.address.rpartition("/")[2] + "/")] == [
        f"{bucket.address.rpartition('/')[2]}/file"
    ]


@pytest.mark.parametrize("cut", ["before", "after", "middle"])
def test_an_upload_goes_on_where_its_connection_closed(bucket, server, tmp_path, monkeypatch, cut):
    monkeypatch.setattr(store, "CHUNK", 2**18)
    content = os.urandom(3 * 2**18 - 5)
    (tmp_path / "large").write_bytes(content)
    for number in range(3):  # of the chunk at which the connection closes
        left, before = [number], len(server.requests)

        def at(asked, left=left):
            if asked.method != "PUT":
                return False
            left[0] -= 1
            return left[0] == -1

        with server.failing(times(1, Fault(cut=cut), at)):
            bucket.upload("large", tmp_path / "large")
        chunks = [one for one in server.requests[before:] if one.method == "PUT"]
        assert len(chunks) <= 6  # no chunk before the one that failed was sent again
        bucket.download("large", tmp_path / "again", len(content))
        assert (tmp_path / "again").read_bytes() == content


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "no valid credentials.*gcloud auth application-default login"),
        (403, "the account may not do this.*roles/storage.objectUser"),
        (404, "there is no bucket bucket.*gcloud storage buckets create gs://bucket"),
        (400, "the store refused it"),
    ],
)
def test_refusals_of_a_store_say_what_to_do_and_are_not_repeated(bucket, server, status, message):
    before = len(server.requests)
    with server.failing(lambda asked: Fault(status=status)), pytest.raises(BucketError, match=message):
        bucket.check()
    assert len(server.requests) - before <= 1


def test_an_outage_ends_with_an_error(bucket, server, monkeypatch):
    monkeypatch.setattr(store, "OUTAGE_SECONDS", 0.1)
    with (
        server.failing(lambda asked: Fault(status=503)),
        pytest.raises(BucketError, match="failed again and again.*same command again"),
    ):
        bucket.entries()


def test_a_store_that_never_answers_ends_with_an_error(bucket, server, monkeypatch):
    bucket.check()
    monkeypatch.setattr(store, "OUTAGE_SECONDS", 0.1)
    monkeypatch.setattr(store, "ANSWER_SECONDS", 0.2)
    with server.failing(lambda asked: Fault(seconds=1)), pytest.raises(BucketError, match="no answer within"):
        bucket.entries()


def test_bytes_that_changed_on_the_way_are_deleted(bucket, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"good")
    send = Bucket._write_whole
    monkeypatch.setattr(Bucket, "_write_whole", lambda self, name, data, **more: send(self, name, b"bad!", **more))
    with pytest.raises(BucketError, match="arrived with other bytes"):
        bucket.upload("file", tmp_path / "file")
    assert bucket.entries() == {}


def test_a_write_names_what_it_replaces(bucket):
    first = bucket.write("object", b"1", generation="0")
    with pytest.raises(Changed):
        bucket.write("object", b"2", generation="0")
    bucket.write("object", b"2", generation=first)
    with pytest.raises(Changed):
        bucket.delete("object", generation=first)
    assert bucket.read("object").data == b"2"
    assert bucket.entries() == {"object": Entry(1, "yB5yjZ1ML2NvBn+JzBSGLA==")}


@pytest.mark.parametrize(
    "address", ["gs://bucket", "gs://bucket/", "gs:///run", "gs://bucket/a//b", "gs://bucket/a/../b", "gs://bucket/a*"]
)
def test_addresses_without_a_folder_are_refused(address):
    with pytest.raises(ConfigError, match="write gs://BUCKET/FOLDER"):
        Bucket(address)


def test_a_program_that_has_imported_gcsfs_before_gets_no_lookup_of_the_kind_of_a_bucket(bucket, monkeypatch):
    """As it does there: gcsfs has read its switch, which nobody had set."""
    extended = pytest.importorskip("gcsfs.extended_gcsfs").ExtendedGcsFileSystem
    monkeypatch.delenv(gcs.SWITCH)
    monkeypatch.setattr("gcsfs.GCSFileSystem", extended)
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, extended, clobber=True)
    try:
        assert type(Bucket(bucket.address)._files) is not extended
        assert type(fsspec.filesystem("gs")) is not extended  # what Orbax takes
        fsspec.register_implementation("gs", extended, clobber=True)
        assert type(url_parts(bucket.address)[0]) is not extended
        fsspec.register_implementation("gs", extended, clobber=True)
        assert type(Objects(bucket.address)._files) is not extended
        monkeypatch.setenv(gcs.SWITCH, "true")  # whoever sets it gets it
        assert type(fsspec.filesystem("gs")) is not extended and gcs.gcs_file_system() is extended
    finally:
        monkeypatch.setenv(gcs.SWITCH, "false")
        gcs.gcs_file_system()


# -- leases --------------------------------------------------------------------------------------


@pytest.fixture
def quick_leases(monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.1)


def elsewhere(**changes) -> Owner:
    return replace(Owner(what="jaxft train", host="other-host", machine="another kernel"), **changes)


def test_a_lease_keeps_others_out_and_ends(bucket, quick_leases):
    lease = Lease(bucket, "jaxft train")
    assert owner_now(bucket).id == lease.owner.id
    with pytest.raises(FolderInUseError, match="is being written by `jaxft train`"):
        Lease(bucket, "jaxft train")
    time.sleep(0.3)  # it is renewed
    lease.check()
    lease.release()
    assert owner_now(bucket) is None and bucket.read(LOCK) is None


def test_a_lease_of_a_dead_host_is_taken_over_once_it_has_expired(bucket, quick_leases):
    bucket.write(LOCK, elsewhere().to_text().encode())
    began = time.monotonic()
    lease = Lease(bucket, "jaxft train")
    assert 0.5 < time.monotonic() - began < 5
    lease.release()


def test_a_lease_of_a_dead_process_of_this_machine_is_taken_at_once(bucket, monkeypatch):
    monkeypatch.setattr("jaxft.files.buckets.lease.is_alive", lambda owner: False)
    bucket.write(LOCK, Owner(what="jaxft train").to_text().encode())
    Lease(bucket, "jaxft train").release()


def own_number(**changes) -> Owner:
    return Owner(what="jaxft train", pid=os.getpid(), **changes)


NUMBERS = {
    # In a container that was started again, the process has the number of the one that was killed.
    "of this process": lambda: own_number(),
    "of another process by now": lambda: Owner(what="jaxft train", pid=os.getppid(), renewed=time.time() - 5),
    "of a process in another container": lambda: own_number(machine=running_kernel().partition(" ")[0] + " pid:[7]"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_lease_is_not_kept_by_a_process_that_only_has_the_number_of_its_owner(bucket, quick_leases, name):
    bucket.write(LOCK, NUMBERS[name]().to_text().encode())
    Lease(bucket, "jaxft train").release()


def test_a_process_in_another_container_keeps_its_lease_although_its_number_is_nobodys_here(bucket, quick_leases):
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    owner = Owner(what="jaxft train", pid=dead.pid, machine=running_kernel().partition(" ")[0] + " pid:[7]")
    bucket.write(LOCK, owner.to_text().encode())
    assert owner_now(bucket) == owner
    renewal = threading.Timer(0.2, lambda: bucket.write(LOCK, replace(owner, renewed=time.time()).to_text().encode()))
    renewal.start()
    with pytest.raises(FolderInUseError, match=f"process {dead.pid}"):
        Lease(bucket, "jaxft train")
    renewal.join()


def test_a_lease_that_is_renewed_elsewhere_is_not_taken(bucket, quick_leases):
    bucket.write(LOCK, elsewhere().to_text().encode())
    renewal = threading.Timer(0.2, lambda: bucket.write(LOCK, elsewhere(renewed=time.time() + 1).to_text().encode()))
    renewal.start()
    with pytest.raises(FolderInUseError, match="on host other-host"):
        Lease(bucket, "jaxft train")
    renewal.join()


def test_of_many_that_take_a_lease_at_once_one_gets_it(bucket):
    got, refused = [], []

    def take() -> None:
        try:
            got.append(Lease(bucket, "jaxft train"))
        except FolderInUseError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 5
    got[0].release()


def test_an_owner_whose_lease_was_taken_uploads_nothing_more(bucket, server, quick_leases):
    with (
        pytest.raises(FolderInUseError, match="has expired.*other-host.*Nothing more is written"),
        written(bucket.address, "jaxft train") as copy,
    ):
        (copy.path / MARK).write_text("{}")
        copy.push()
        bucket.write(LOCK, elsewhere().to_text().encode())
        time.sleep(0.4)
        (copy.path / "metrics.jsonl").write_text("{}")
    assert "metrics.jsonl" not in bucket.entries()
    assert json.loads(bucket.read(LOCK).data)["host"] == "other-host"


# -- working copies ------------------------------------------------------------------------------


def test_a_working_copy_and_its_bucket_become_equal(bucket, server):
    with written(bucket.address, "jaxft train") as copy:
        folder = folder_of(bucket.address)
        assert folder == copy.path and shown(folder / "a") == f"{bucket.address}/a"
        for name in (
            MARK,
            "metrics.jsonl",
            "summary.json",
            "adapter/SHA256SUMS",
            "adapter/a",
            "adapter.jaxft.partial/a",
            "x.jaxft.tmp",
        ):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
        before = len(server.requests)
        copy.push()
        order = [one.name.partition("/")[2] for one in server.requests[before:] if one.method == "POST"]
        assert order == [MARK, "adapter/a", "metrics.jsonl", "adapter/SHA256SUMS", "summary.json"]
        (folder / "summary.json").unlink()
        with open(folder / "metrics.jsonl", "a") as file:
            file.write("\nmore")
        before = len(server.requests)
    sent = [
        (one.method, one.name.partition("/")[2])
        for one in server.requests[before:]
        if one.name.rpartition("/")[2] != LOCK
    ]
    assert sent == [("POST", "metrics.jsonl"), ("DELETE", "summary.json")]  # nothing is sent twice
    assert not folder.exists()
    assert bucket.read("metrics.jsonl").data == b"metrics.jsonl\nmore"
    with written(bucket.address, "jaxft train") as copy:
        assert {path.name for path in copy.path.rglob("*")} == {MARK, "metrics.jsonl", "adapter", "a", "SHA256SUMS"}


def test_large_files_of_exports_stay_in_the_bucket_until_the_export_is_replaced(bucket, monkeypatch):
    monkeypatch.setattr(working_copy, "MOST_BYTES", 100)
    for name, content in {
        MARK: b"{}",
        "model/weights": bytes(200),
        "model/SHA256SUMS": b"s",
        "base/w": bytes(200),
    }.items():
        bucket.write(name, content)
    with written(bucket.address, "jaxft train") as copy:
        assert (copy.path / "base/w").exists() and not (copy.path / "model/weights").exists()
        copy.push()
        assert "model/weights" in bucket.entries()
        (copy.path / "model/SHA256SUMS").unlink()
        copy.push()
        assert set(bucket.entries()) == {MARK, "base/w", LOCK}


def test_what_is_no_run_is_neither_fetched_nor_overwritten(bucket):
    bucket.write("data.csv", b"of somebody")
    with pytest.raises(ConfigError, match="holds no run.*data.csv.*Set output_dir to a new folder"):
        with written(bucket.address, "jaxft train"):
            pass
    assert set(bucket.entries()) == {"data.csv"}


@pytest.mark.parametrize("name", ["../../outside", "/outside", "adapter/./a", "a//b", ".."])
def test_an_object_whose_name_leads_out_of_the_folder_is_not_fetched(bucket, monkeypatch, name):
    """Google's buckets take such names, the one of the tests does not."""
    bucket.write(MARK, b"{}")
    entries, fetched = Bucket.entries, []
    monkeypatch.setattr(Bucket, "entries", lambda self, below="": entries(self, below) | {name: Entry(1, "")})
    monkeypatch.setattr(Bucket, "download", lambda self, name, path, size: fetched.append(name) or path.touch())
    for read in (lambda: folder_of(bucket.address), lambda: written(bucket.address, "jaxft train").__enter__()):
        with pytest.raises(BucketError, match="no path of a file within a folder.*Rename or delete"):
            read()
    assert set(fetched) <= {MARK} and LOCK not in entries(bucket)


@pytest.mark.parametrize("name", ["a b", "a%b", "a{b}", "a|b"])
def test_a_name_that_steps_cannot_have_is_refused_before_anything_is_written(bucket, server, name):
    before = len(server.requests)
    with pytest.raises(CheckpointError, match="Choose a name without these characters"):
        with locked_run(f"{bucket.address}/{name}", "jaxft train"):
            pass
    assert len(server.requests) == before


def test_objects_among_the_checkpoints_that_no_run_left_are_not_deleted(bucket):
    """Those of a copy that left files out, say, where a run with other settings would begin anew."""
    for name in (MARK, "checkpoints/2/state/d/0", "checkpoints/2.saving", "checkpoints/.access-0"):
        bucket.write(name, b"x")
    with written(bucket.address, "jaxft train") as copy:
        exports.clear(copy.path)
    left = {"checkpoints/.access-0", MARK}
    assert set(bucket.entries()) == left
    bucket.write("checkpoints/4/state/d/0", b"x")
    with pytest.raises(ConfigError, match=r"checkpoints has 4, and it is not known that a run wrote it.*Move it"):
        with written(bucket.address, "jaxft train") as copy:
            exports.clear(copy.path)
    assert set(bucket.entries()) == left | {"checkpoints/4/state/d/0"}


def test_a_failing_upload_is_told_and_what_it_left_is_sent_at_the_end(bucket, server, caplog, monkeypatch):
    monkeypatch.setattr(working_copy, "PUSH_SECONDS", 0.05)
    with written(bucket.address, "jaxft train") as copy:
        with server.failing(lambda asked: Fault(status=403)):
            (copy.path / MARK).write_text("{}")
            time.sleep(0.3)
    assert "the account may not do this" in caplog.text
    assert bucket.read(MARK).data == b"{}"


def test_runs_in_a_bucket_are_listed_from_their_small_files(bucket, server):
    for run, summary in {"a": b'{"steps": 4}', "b/c": None}.items():
        bucket.write(f"{run}/{MARK}", b'{"jaxft_run": 1, "id": "1", "created": "x", "history": []}')
        bucket.write(f"{run}/model/weights", bytes(10))
        if summary is not None:
            bucket.write(f"{run}/summary.json", summary)
    before = len(server.requests)
    states = {run.folder.removeprefix(bucket.address): run.state for run in runs_below(bucket.address)}
    assert states == {"/a": "finished", "/b/c": "interrupted"}
    assert not [one for one in server.requests[before:] if one.name.endswith("weights")]
    assert address_of("/tmp") is None


def test_a_staged_folder_is_read_in_the_bucket_until_it_has_its_name(bucket, server):
    with written(bucket.address, "jaxft train") as copy:
        (copy.path / MARK).write_text("{}")
        unfinished = copy.path / "adapter.jaxft.partial"
        unfinished.mkdir()
        for name in (UNFINISHED, "a", "SHA256SUMS"):
            (unfinished / name).write_text(name)
        before = len(server.requests)
        stage(unfinished)
        order = [one.name.partition("/")[2] for one in server.requests[before:] if one.method == "POST"]
        # Its mark is the first, by which others know that it may be deleted.
        assert order == [
            f"adapter.jaxft.partial/{UNFINISHED}",
            MARK,
            "adapter.jaxft.partial/a",
            "adapter.jaxft.partial/SHA256SUMS",
        ]
        (unfinished / UNFINISHED).unlink()
        unfinished.rename(copy.path / "adapter")
        copy.push()
        assert set(bucket.entries()) == {MARK, LOCK, "adapter/a", "adapter/SHA256SUMS"}


def test_what_a_killed_process_has_staged_is_not_fetched_and_goes(bucket, server):
    mark, kept = f"merged.jaxft.partial/{UNFINISHED}", "mine.jaxft.partial/a"
    for name in (MARK, mark, "merged.jaxft.partial/a", kept):
        bucket.write(name, b"{}")
    with written(bucket.address, "jaxft train") as copy:
        assert [path.name for path in copy.path.rglob("*")] == [MARK]
        before = len(server.requests)
        copy.push()
        deleted = [one.name.partition("/")[2] for one in server.requests[before:] if one.method == "DELETE"]
        assert deleted == ["merged.jaxft.partial/a", mark]
    assert set(bucket.entries()) == {MARK, kept}  # nobody of the run has written that


def test_a_copy_that_is_read_follows_the_bucket(bucket, server):
    for name in (MARK, "adapter/a", "adapter/b"):
        bucket.write(name, b"1")
    folder = folder_of(bucket.address)
    with open(folder / "adapter/a", "rb") as reading:
        bucket.write("adapter/a", b"2")
        bucket.delete("adapter/b")
        before = len(server.requests)
        assert folder_of(bucket.address) == folder
        read = [one.path for one in server.requests[before:] if "alt=media" in one.path]
        assert len(read) == 1 and "adapter%2Fa" in read[0]  # the others are as they were
        assert (folder / "adapter/a").read_bytes() == b"2" and not (folder / "adapter/b").exists()
        assert reading.read() == b"1"
    (folder / "mine").write_text("x")
    (folder / "adapter/a").write_text("changed here")
    folder_of(bucket.address)
    assert (folder / "mine").exists() and (folder / "adapter/a").read_text() == "changed here"
    forget(bucket.address)


def test_another_process_fetches_what_it_needs_alone(bucket):
    for name in (MARK, "config.json", "teacher/1/ids.npy", "teacher/2/ids.npy", "model/weights"):
        bucket.write(name, name.encode())
    folder = empty_folder_of(bucket.address)
    assert folder == folder_of(bucket.address) and not any(folder.iterdir())
    fetch(folder / "config.json")
    fetch(folder / "teacher" / "1")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "config.json",
        "teacher/1/ids.npy",
    }
    with pytest.raises(BucketError, match=f"{bucket.address}/teacher/3 is not there"):
        fetch(folder / "teacher" / "3")
    forget(bucket.address)
    assert not folder.exists()


def test_the_copies_of_killed_processes_go_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    alive, mine = Scratch(), tmp_path / "of-another-program"
    code = "from jaxft.files.buckets.scratch import Scratch; import os; print(Scratch().path); os.kill(os.getpid(), 9)"
    killed = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert killed.returncode == -9
    dead = next(path for path in tmp_path.iterdir() if path != alive.path)
    mine.mkdir()
    Scratch().remove()
    assert dead.exists()  # it may be one that is being made
    for path in (dead, alive.path, mine):
        os.utime(path, (1, 1))
    Scratch().remove()
    assert sorted(tmp_path.iterdir()) == sorted([alive.path, mine])
    alive.remove()
    assert list(tmp_path.iterdir()) == [mine]


def test_other_stores_are_refused():
    with pytest.raises(ConfigError, match="s3://bucket/run is an address.*mount the store"):
        folder_of("s3://bucket/run")
