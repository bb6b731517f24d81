"""RunCheckpoints in a bucket: exact, whole or refused, whatever fails on the way."""

import itertools
import json
import os
import random
import signal
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from bucket_server import BucketServer, Fault, times
from children import ended, run, until

from jaxft.checkpoint import manifest
from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.errors import CheckpointError

STORM = 3  # requests that fail before one is answered; the first repetition is after a second


@pytest.fixture(scope="module")
def server():
    server = BucketServer()
    kept = {name: os.environ.get(name) for name in server.environment()}
    os.environ.update(server.environment())
    server.make("bucket")
    yield server
    server.close()
    for name, value in kept.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def folder(server, request):
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return f"gs://bucket/{name}/checkpoints"


def state(step):
    chance = np.random.default_rng(step)
    return {
        "x": jnp.asarray(chance.standard_normal((16, 8)), jnp.float32),
        "half": jnp.asarray(chance.standard_normal(5), jnp.bfloat16),
        "key": jax.random.key(step),
    }


def assert_restored(restored, step):
    arrays, extra = restored
    assert extra == {"step": step}
    for name, array in state(step).items():
        raw = [jax.random.key_data(a) if name == "key" else a for a in (arrays[name], array)]
        assert raw[0].dtype == raw[1].dtype
        assert np.asarray(raw[0]).tobytes() == np.asarray(raw[1]).tobytes()


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, state(step), {"step": step})
    checkpoints.wait()


def below(folder):
    return folder.removeprefix("gs://bucket/") + "/"


def names(server, folder):
    return [name.removeprefix(below(folder)) for name in server.names("bucket", below(folder))]


def test_the_bucket_of_these_tests_names_generations_as_googles_does(server):
    """TensorStore calls one that is missing malformed, once it has read an object again before it replaces it."""
    store = tensorstore.KvStore.open({"driver": "gcs", "bucket": "bucket", "path": "generations/"}).result()
    written = store.write("a", b"1").result()
    read = store.read("a").result()
    assert (read.value, read.stamp.generation) == (b"1", written.generation)
    replaced = store.write("a", b"2", if_equal=read.stamp.generation).result()
    assert store.write("a", b"3", if_equal=read.stamp.generation).result().generation != replaced.generation
    assert store.read("a").result().value == b"2"


def test_a_run_goes_on_bit_for_bit_and_keeps_no_more_than_it_should(server, folder, caplog):
    with RunCheckpoints(folder, keep=2) as checkpoints:
        assert checkpoints.restore(state(0)) is None
        save(checkpoints, 1, 2, 3)
    assert not [r for r in server.requests if "rewriteTo" in r.path or "copyTo" in r.path]  # nothing was renamed
    with RunCheckpoints(folder, keep=2) as checkpoints:
        assert checkpoints.all_steps() == (2, 3)
        assert_restored(checkpoints.restore(state(0)), 3)
        assert_restored(checkpoints.restore(state(0), 2), 2)
        # Of one step the part that is asked for alone is read.
        half = checkpoints.open().read_parts({"half": state(0)["half"]})["half"]
        np.testing.assert_array_equal(half, state(3)["half"])
        save(checkpoints, 4)
    assert {name.split("/")[0] for name in names(server, folder)} == {"3", "4"}
    assert not [record for record in caplog.records if record.name.startswith("jaxft")]


def test_a_step_is_whole_when_its_manifest_is_and_it_is_the_last_object(server, folder):
    written = len(server.requests)
    with RunCheckpoints(folder, keep=1) as checkpoints:
        save(checkpoints, 1)
        first = [r.name.removeprefix(below(folder)) for r in server.requests[written:] if r.method == "POST"]
        save(checkpoints, 2)
    last = [name for name in first if name.startswith("1/") or name == "1.saving"]
    assert last[0] == "1.saving"
    assert last[-1] == "1/manifest.json"
    changes = [(r.method, r.name.removeprefix(below(folder))) for r in server.requests[written:] if r.method != "GET"]
    whole = max(at for at, change in enumerate(changes) if change == ("POST", "2/manifest.json"))
    assert next(at for at, change in enumerate(changes) if change == ("POST", "1.deleted")) > whole
    sums = json.loads(server.read("bucket", below(folder) + "2/manifest.json"))
    assert sums["algorithm"] == "md5"
    assert set(sums["files"]) | {"manifest.json"} == {n.removeprefix("2/") for n in names(server, folder)}


FAULTS = [
    pytest.param(Fault(429), marks=pytest.mark.slow), Fault(503), Fault(cut="before"),
    pytest.param(Fault(cut="after"), marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_save_outlives_requests_that_fail_for_a_while(server, folder, fault):
    rules = [
        times(STORM, fault, lambda r: r.method == "POST" and "/ocdbt." in r.name),  # by TensorStore
        times(2, fault, lambda r: r.method == "POST" and r.name.endswith(("1.saving", "/_METADATA"))),  # by gcsfs
        times(2, fault, lambda r: r.method == "GET" and r.path.endswith("checkpoints/&maxResults=1000")),
    ]
    with RunCheckpoints(folder, keep=1) as checkpoints:
        with server.failing(lambda r: next(filter(None, (rule(r) for rule in rules)), None)):
            save(checkpoints, 1)
        reads = times(STORM, fault if fault.cut != "after" else Fault(cut="middle"), lambda r: "/ocdbt." in r.name)
        with server.failing(reads):
            assert_restored(checkpoints.restore(state(0)), 1)


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (401, "no valid credentials(?s:.*)gcloud auth application-default login"),
        (403, "may not do this in gs://bucket(?s:.*)roles/storage.objectUser"),
        (404, "no bucket gs://bucket(?s:.*)gcloud storage buckets create gs://bucket"),
    ],
)
def test_a_bucket_that_refuses_is_told_of_before_the_first_step(server, folder, status, why):
    with server.failing(lambda r: Fault(status)), pytest.raises(CheckpointError, match=why):
        RunCheckpoints(folder, keep=1)
    with server.failing(lambda r: Fault(status) if r.method == "DELETE" else None):
        if status != 404:  # which says that it is deleted
            with pytest.raises(CheckpointError, match=why):  # old steps could not be deleted
                RunCheckpoints(folder, keep=1)


def test_a_bucket_that_refuses_in_the_middle_is_told_of_once_and_the_run_goes_on_from_the_step_before(
    server, folder, capfd
):
    checkpoints = RunCheckpoints(folder, keep=1)
    save(checkpoints, 1)
    with server.failing(lambda r: Fault(403) if r.method == "POST" and "/2/" in r.name else None):
        checkpoints.save(2, state(2), {"step": 2})
        with pytest.raises(
            CheckpointError, match=r"step 2 was not saved(?s:.*)objectUser(?s:.*)step 1 is whole"
        ) as told:
            checkpoints.close()
    assert "Traceback" not in capfd.readouterr().err
    assert "127.0.0.1" not in str(told.value)
    with RunCheckpoints(folder, keep=1) as checkpoints:
        assert {name.split("/")[0] for name in names(server, folder)} == {"1"}  # nothing of step 2 is left
        assert_restored(checkpoints.restore(state(0)), 1)
        save(checkpoints, 2)
        assert_restored(checkpoints.restore(state(0)), 2)


def test_a_step_that_failed_is_not_begun_again_over_what_may_still_arrive(server, folder):
    checkpoints = RunCheckpoints(folder, keep=1)
    with server.failing(lambda r: Fault(403) if r.method == "POST" and "/1/" in r.name else None):
        checkpoints.save(1, state(1), {"step": 1})
        with pytest.raises(CheckpointError, match="no earlier step is whole"):
            checkpoints.wait()
    with pytest.raises(CheckpointError, match="step 1 failed to be saved .*Save a later step"):
        checkpoints.save(1, state(1), {"step": 1})
    save(checkpoints, 2)
    checkpoints.close()
    with RunCheckpoints(folder, keep=1) as checkpoints:
        assert_restored(checkpoints.restore(state(0)), 2)


def test_harm_to_any_object_is_refused_by_name(server, folder):
    with RunCheckpoints(folder, keep=2) as checkpoints:
        save(checkpoints, 1, 2)
        for name in names(server, folder):
            if not name.startswith("2/") or name == "2/manifest.json":
                continue
            whole = f"{below(folder)}{name}"
            content = server.read("bucket", whole)
            server.write("bucket", whole, bytes([content[0] ^ 1]) + content[1:])
            with pytest.raises(CheckpointError, match=rf"{name[2:]}: damaged(?s:.*)go back to step 1"):
                checkpoints.restore(state(0))
            server.delete("bucket", whole)
            with pytest.raises(CheckpointError, match=rf"{name[2:]}: missing(?s:.*)Delete .*/2 to go back to step 1"):
                checkpoints.restore(state(0))
            server.write("bucket", whole, content)
        server.write("bucket", f"{below(folder)}2/more", b"{}")
        with pytest.raises(manifest.StrayFiles, match="more"):
            checkpoints.restore(state(0))
        server.delete("bucket", f"{below(folder)}2/more")
        assert_restored(checkpoints.restore(state(0)), 2)


def test_leftovers_of_ours_are_removed_and_what_is_not_ours_is_refused_with_the_mend(server, folder, caplog):
    with RunCheckpoints(folder, keep=3) as checkpoints:
        save(checkpoints, 1, 2, 3)
    kept = server.read("bucket", f"{below(folder)}3/manifest.json")
    server.delete("bucket", f"{below(folder)}3/manifest.json")
    with pytest.raises(CheckpointError, match="3 has no manifest.json(?s:.*)copy manifest.json from the original"):
        RunCheckpoints(folder, keep=3)
    server.write("bucket", f"{below(folder)}3.saving", b"{}")  # as a killed save leaves it
    server.write("bucket", f"{below(folder)}2.deleted", b"{}")  # as a killed deletion leaves it
    server.write("bucket", f"{below(folder)}1.saving", b"{}")  # the last that a save does was not done
    with RunCheckpoints(folder, keep=3) as checkpoints:
        assert checkpoints.all_steps() == (1,)
    assert {name.split("/")[0] for name in names(server, folder)} == {"1"}
    assert [r.getMessage().split(":")[1].rsplit("/", 1)[1] for r in caplog.records] == ["2", "3"]
    assert kept


def test_a_step_that_was_moved_to_another_number_is_refused_with_the_mend(server, folder):
    with RunCheckpoints(folder, keep=3) as checkpoints:
        save(checkpoints, 1)
    for name in names(server, folder):
        content = server.read("bucket", below(folder) + name)
        server.write("bucket", below(folder) + name.replace("1/", "7/", 1), content)
        server.delete("bucket", below(folder) + name)
    with pytest.raises(CheckpointError, match=f"7 holds step 1.*gcloud storage mv {folder}/7 {folder}/1"):
        RunCheckpoints(folder, keep=3)


def test_a_run_is_copied_from_disk_to_bucket_and_back_and_goes_on(server, folder, tmp_path):
    with RunCheckpoints(tmp_path / "first", keep=1) as checkpoints:
        save(checkpoints, 1)
    for path in filter(os.path.isfile, (tmp_path / "first").rglob("*")):
        server.write("bucket", below(folder) + path.relative_to(tmp_path / "first").as_posix(), path.read_bytes())
    with RunCheckpoints(folder, keep=1) as checkpoints:
        assert_restored(checkpoints.restore(state(0)), 1)
        save(checkpoints, 2)
    for name in names(server, folder):
        path = tmp_path / "second" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(server.read("bucket", below(folder) + name))
    with RunCheckpoints(tmp_path / "second", keep=1) as checkpoints:
        assert_restored(checkpoints.restore(state(0)), 2)
        save(checkpoints, 3)
        assert_restored(checkpoints.restore(state(0)), 3)


def test_addresses_that_cannot_be_written_are_refused_before_any_request(server):
    before = len(server.requests)
    for address in ("s3://bucket/run", "gs://bucket", "https://host/run"):
        with pytest.raises(CheckpointError, match="gs://BUCKET/FOLDER"):
            RunCheckpoints(address, keep=1)
    with pytest.raises(CheckpointError, match="Choose a name without these characters"):
        RunCheckpoints("gs://bucket/run[1]", keep=1)
    assert len(server.requests) == before


def expect_no_harm(folder, before):
    """After a kill, the newest step is whole and not older than before; nothing else is left."""
    with RunCheckpoints(folder, keep=1) as checkpoints:
        restored = checkpoints.restore({"x": jax.ShapeDtypeStruct((64, 64), jnp.float32)})
        newest = checkpoints.latest_step() or 0
        assert newest >= before
        if restored is not None:
            assert restored[1] == {"step": newest}
            np.testing.assert_array_equal(restored[0]["x"], np.full((64, 64), newest, np.float32))
    return newest


def kill_at(server, folder, chance):
    """Kills a process that saves, at one of the requests of its saves."""
    child = run("save_forever.py", folder)
    until(child, "saving")
    last = len(server.requests) + chance.randrange(400)
    while len(server.requests) < last:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_after_sigkill_the_newest_step_is_whole_and_nothing_else_is_left(server, folder, kills):
    chance, newest = random.Random(kills), 0
    for _ in range(kills):
        kill_at(server, folder, chance)
        newest = expect_no_harm(folder, newest)
        assert {name.split("/")[0] for name in names(server, folder)} == ({str(newest)} if newest else set())


@pytest.mark.slow
def test_two_processes_save_their_own_shards_and_resume_in_any_number(server, folder):
    def two():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = "--xla_force_host_platform_device_count=2"
        children = [run("two_processes_bucket.py", folder, port, index, flags=flags) for index in range(2)]
        return {ended(child)[-1] for child in children}

    assert two() == {"0"}
    kinds = {name.split("/")[2] for name in names(server, folder) if name.startswith("2/state/")}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= kinds
    assert two() == {"2"}
    with RunCheckpoints(folder, keep=1) as checkpoints:  # one process
        assert checkpoints.all_steps() == (4,)
        restored, _ = checkpoints.restore({"x": jax.ShapeDtypeStruct((8, 256), jnp.float32)})
        np.testing.assert_array_equal(restored["x"], np.arange(2048, dtype=np.float32).reshape(8, 256) + 4)
        checkpoints.save(5, {"x": restored["x"] + 1}, {"step": 5})
    assert two() == {"5"}


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 503])
def test_a_storm_that_fails_every_fifth_request_changes_no_bit(server, folder, status):
    count = itertools.count()
    with (
        server.failing(lambda r: None if next(count) % 5 else Fault(status)),
        RunCheckpoints(folder, keep=1) as checkpoints,
    ):
        save(checkpoints, 1, 2, 3)
        assert_restored(checkpoints.restore(state(0)), 3)


@pytest.mark.slow
def test_a_connection_over_which_nothing_comes_is_given_up_and_made_anew(server, folder):
    child = run("save_once.py", folder)
    with server.failing(times(1, Fault(seconds=90), lambda r: r.method == "POST" and "/ocdbt." in r.name)):
        assert float(ended(child)[-1]) < 60
    with RunCheckpoints(folder, keep=1) as checkpoints:
        assert checkpoints.all_steps() == (1,)
