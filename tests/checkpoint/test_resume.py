"""RunCheckpoints: exact, verified, and bounded in number."""

import contextlib
import itertools
import logging
import os
import random
import shlex
import shutil
import subprocess
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.checkpoint.plain_path import check_path
from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.checkpoint.steps import folders, read_back
from jaxft.checkpoint.steps.layout import as_arrays
from jaxft.errors import CheckpointError

EXTRA = {"data": {"epoch": 1, "row": 17}, "config": {"seed": 0, "name": "Ω"}}


class State(NamedTuple):
    step: jax.Array
    trainable: dict
    opt_state: tuple
    key: jax.Array


def make_state(seed=0, mesh=None):
    keys = jax.random.split(jax.random.key(seed), 4)
    trainable = {
        "layers": {
            "0": {"kernel": jax.random.normal(keys[0], (2, 16, 8)), "lora_a": jax.random.normal(keys[1], (2, 16, 4))},
        },
        "half": jax.random.normal(keys[2], (8, 8), jnp.bfloat16),
        "odd": jnp.array([3.4028235e38, -1e-38, -0.0, 1e-42], jnp.float32),
        "ids": jnp.arange(-4, 4, dtype=jnp.int8),
    }
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(trainable)
    state = State(jnp.int32(seed), trainable, opt_state, keys[3])
    if mesh is None:
        return state
    put = lambda x: jax.device_put(x, sharding_for(mesh, x))  # noqa: E731
    return jax.tree.map(put, state)


def sharding_for(mesh, x):
    split = x.ndim >= 2 and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return NamedSharding(mesh, P(*([None] * (x.ndim - 2)), "fsdp") if split else P())


def abstract(state, mesh=None):
    struct = lambda x: jax.ShapeDtypeStruct(  # noqa: E731
        x.shape, x.dtype, sharding=x.sharding if mesh is None else sharding_for(mesh, x)
    )
    return jax.tree.map(struct, state)


def mesh_of(count):
    assert len(jax.devices()) >= count
    return Mesh(np.array(jax.devices()[:count]), ("fsdp",))


def bits(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert bits(x) == bits(y)


def saved(folder, steps=(1,), **options):
    with RunCheckpoints(folder, keep=10, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), EXTRA)
    return folder


# Exactness


def test_round_trip_is_bitwise(tmp_path):
    state = make_state(3)
    with RunCheckpoints(tmp_path / "a" / "b", keep=2) as checkpoints:
        assert checkpoints.restore(abstract(state)) is None
        assert checkpoints.save(3, state, EXTRA, {"loss": 1.5})
    with RunCheckpoints(tmp_path / "a" / "b", keep=2) as checkpoints:
        restored, extra = checkpoints.restore(abstract(state))
    assert_same(restored, state)
    assert extra == EXTRA
    assert jax.random.uniform(restored.key) == jax.random.uniform(state.key)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_every_kind_come_back_typed(tmp_path, impl):
    state = {"one": jax.random.key(1, impl=impl), "many": jax.random.split(jax.random.key(2, impl=impl), 3)}
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    assert_same(restored, state)


def test_nnx_states_come_back_as_such_and_are_named_without_their_variables(tmp_path):
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"trainable": state}, {})
        restored, _ = checkpoints.restore(jax.eval_shape(lambda: {"trainable": state}))
        with pytest.raises(CheckpointError, match=r"trainable/kernel: in the checkpoint \(float32\[3, 2\]\)"):
            checkpoints.restore({"trainable": {}})
    assert_same(restored, {"trainable": state})


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_saved_on_8_devices_restores_on_any_number(tmp_path, count):
    state = make_state(5, mesh_of(8))
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, state, EXTRA)
        target = abstract(state, mesh_of(count))
        restored, _ = checkpoints.restore(target)
    assert_same(restored, state)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    weights = jnp.arange(2**20, dtype=jnp.float32)
    expected = np.array(weights)
    spoil = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"w": weights}, {})
        for _ in range(5):
            weights = spoil(weights)
        weights.block_until_ready()
        restored, _ = checkpoints.restore({"w": jax.ShapeDtypeStruct((2**20,), jnp.float32)})
    np.testing.assert_array_equal(restored["w"], expected)


# What is kept


def test_keeps_the_newest(tmp_path):
    with RunCheckpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, {"x": jnp.float32(step)}, {})
    assert checkpoints.all_steps() == (3, 4)
    assert checkpoints.latest_step() == 4
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]


@pytest.mark.parametrize(("mode", "kept"), [("min", (20, 60)), ("max", (10, 60))], ids=["min", "max"])
def test_keeps_the_best_beside_the_newest(tmp_path, mode, kept):
    losses = {10: 3.0, 20: 1.0, 30: float("nan"), 40: 2.0, 50: None, 60: 2.5}
    for step, loss in losses.items():  # a new process each time: the metrics are read back
        with RunCheckpoints(tmp_path, keep=1, best_metric="eval_loss", best_mode=mode) as checkpoints:
            metrics = {"loss": 0.0} if loss is None else {"eval_loss": loss}
            checkpoints.save(step, {"x": jnp.float32(step)}, {}, metrics)
    assert checkpoints.all_steps() == kept


def test_the_newest_stays_however_bad_it_is(tmp_path):
    with RunCheckpoints(tmp_path, keep=1, best_metric="eval_loss") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.float32(step)}, {}, {"eval_loss": float(step)})
            checkpoints.wait()
            assert checkpoints.latest_step() == step
    assert checkpoints.all_steps() == (1, 3)


def test_saving_the_same_step_again_is_a_no_op_but_an_older_one_is_refused(tmp_path):
    with RunCheckpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.save(5, {"x": jnp.float32(5)}, {})
        assert not checkpoints.save(5, {"x": jnp.float32(5)}, {})
        with pytest.raises(CheckpointError, match=r"step 4 was not saved.*step 5 exists already"):
            checkpoints.save(4, {"x": jnp.float32(4)}, {})
    with RunCheckpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.restore({"x": jax.ShapeDtypeStruct((), jnp.float32)})
        assert not checkpoints.save(5, {"x": jnp.float32(5)}, {})


# Damage


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_harm_to_any_file_is_refused_by_name(tmp_path, harm):
    step = saved(tmp_path, (1, 2)) / "2"
    target, chance = abstract(make_state()), random.Random(harm)
    kinds = {path.name for path in files(step)}
    assert {"_METADATA", "_sharding", "metadata", "manifest.ocdbt", "manifest.json"} <= kinds
    with RunCheckpoints(tmp_path, keep=10, read_only=True) as checkpoints:
        for path in files(step):
            whole = path.read_bytes()
            if harm == "remove" and path.name == "manifest.json":
                continue  # then the step was interrupted: another test
            for place in [0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(4))]:
                harmed = bytearray(whole)
                harmed[place] ^= 1 << chance.randrange(8)
                path.write_bytes(bytes(harmed) if harm == "flip" else whole[:place])
                if harm == "remove":
                    path.unlink()
                with pytest.raises(CheckpointError, match=r"(?s)2 to go back to step 1") as caught:
                    checkpoints.restore(target)
                assert path.relative_to(step).as_posix() in str(caught.value)
            path.write_bytes(whole)
        restored, _ = checkpoints.restore(target)
    assert_same(restored, make_state(2))


def test_a_damaged_newest_step_is_never_skipped_silently_and_mended_as_told(tmp_path):
    saved(tmp_path, (1, 2))
    shard = max(files(tmp_path / "2" / "state"), key=lambda p: p.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    target = abstract(make_state())
    with RunCheckpoints(tmp_path, keep=10) as checkpoints:
        with pytest.raises(CheckpointError, match=r"(?s)damaged.*Delete the folder .*/2 to go back to step 1"):
            checkpoints.restore(target)
        restored, _ = checkpoints.restore(target, step=1)
        assert_same(restored, make_state(1))
        shutil.rmtree(tmp_path / "2")
        assert_same(checkpoints.restore(target)[0], make_state(1))


def test_what_an_interrupted_save_left_is_removed_at_the_next_start(tmp_path, caplog):
    saved(tmp_path)
    left = ["3.saving-0", "4.saving-12.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp", "0.deleted"]
    for name in left:
        (tmp_path / name / "state").mkdir(parents=True)
    (tmp_path / "2024").mkdir()  # looks like a step, but Orbax never wrote it
    with RunCheckpoints(tmp_path, keep=10, read_only=True) as reader:
        assert reader.all_steps() == (1,)
        assert len(os.listdir(tmp_path)) == 6
    RunCheckpoints(tmp_path, keep=10).close()
    assert sorted(os.listdir(tmp_path)) == ["1", "2024"]
    assert caplog.text.count("was interrupted") == len(left)


def test_a_step_without_a_manifest_is_set_aside_and_usable_again_as_told(tmp_path, caplog, monkeypatch):
    saved(tmp_path, (1, 2))
    manifest = tmp_path / "2" / "manifest.json"
    kept = manifest.read_bytes()
    manifest.unlink()
    target = abstract(make_state())
    with RunCheckpoints(tmp_path, keep=10) as checkpoints:
        assert_same(checkpoints.restore(target)[0], make_state(1))
    (aside,) = tmp_path.glob("2.unexplained-*")
    assert f"set aside as {aside}" in caplog.text
    RunCheckpoints(tmp_path, keep=10).close()
    assert aside.is_dir()
    command = next(line for line in caplog.text.splitlines() if line.strip().startswith("python -c"))
    program, folder = shlex.split(command)[2:]
    monkeypatch.setattr("sys.argv", ["-c", folder])
    exec(program)
    assert f"Then rename the folder to {tmp_path / '2'}" in caplog.text
    aside.rename(tmp_path / "2")
    assert (tmp_path / "2" / "manifest.json").read_bytes() == kept
    with RunCheckpoints(tmp_path, keep=10) as checkpoints:
        assert_same(checkpoints.restore(target)[0], make_state(2))


@pytest.mark.parametrize("name", [".DS_Store", "state/._x", "meta/.nfs0001", "Thumbs.db", "desktop.ini"])
def test_a_file_of_the_system_in_a_step_is_told_of_and_ignored(tmp_path, caplog, name):
    (saved(tmp_path) / "1" / name).write_text("x")
    with RunCheckpoints(tmp_path, keep=10) as checkpoints:
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(1))
    assert name in caplog.text


def test_the_remedy_for_a_stray_file_is_to_move_the_file_and_not_the_step(tmp_path):
    stray = saved(tmp_path, (1, 2)) / "2" / "state" / "notes.txt"
    stray.write_text("x")
    target = abstract(make_state())
    with RunCheckpoints(tmp_path, keep=10) as checkpoints:
        with pytest.raises(CheckpointError, match="Its own files are whole. Move these files") as caught:
            checkpoints.restore(target)
        assert str(stray) in str(caught.value) and "Delete" not in str(caught.value)
        stray.unlink()
        assert_same(checkpoints.restore(target)[0], make_state(2))


def test_a_step_that_was_renamed_or_is_a_link_is_refused_at_the_start_with_the_mend(tmp_path):
    saved(tmp_path)
    (tmp_path / "1").rename(tmp_path / "24")
    with pytest.raises(CheckpointError, match=r"24 holds step 1, so its folder was renamed. Rename it back to .*/1"):
        RunCheckpoints(tmp_path, keep=1)
    with RunCheckpoints(tmp_path, keep=1, read_only=True) as reader:
        with pytest.raises(CheckpointError, match="24 holds step 1"):
            reader.open()
    (tmp_path / "24").rename(tmp_path / "elsewhere")
    (tmp_path / "1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"/1 is a link to .*/elsewhere.*Remove the link and copy the folder"):
        RunCheckpoints(tmp_path, keep=1)
    (tmp_path / "1").unlink()
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "1")
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.open().step == 1


@pytest.mark.parametrize("name", ["x[1]", "a\\b", "[!a]", "run*", "{a,b}", "50%|#"])
def test_a_path_that_a_library_would_read_as_a_pattern_is_read_as_it_is(tmp_path, name, monkeypatch):
    monkeypatch.setattr("jaxft.checkpoint.resume._saves", itertools.count())
    folder = tmp_path / name / "run"
    (tmp_path / "run1" / "run" / "1.saving-0").mkdir(parents=True)  # what a pattern would find
    saved(folder)
    with RunCheckpoints(folder, keep=10) as checkpoints:
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(1))
        parts = checkpoints.open().read_parts({"trainable": abstract(make_state()).trainable})
    assert_same(parts["trainable"], make_state(1).trainable)
    assert sorted(os.listdir(tmp_path)) == sorted(["run1", name])
    assert not os.listdir(tmp_path / "run1" / "run" / "1.saving-0")


def test_where_a_path_cannot_be_given_another_name_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("jaxft.checkpoint.plain_path.PROC", tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"has \[ \] in its path.*Choose a folder"):
        check_path("runs/x[1]")
    check_path("runs/x")


def test_the_first_step_is_read_back_and_not_whole_if_it_differs(tmp_path, monkeypatch):
    saved(tmp_path)
    read = []
    compare = read_back.compare
    monkeypatch.setattr(read_back, "compare", lambda folder, expected: read.append(compare(folder, expected)))
    saved(tmp_path, (2, 3))
    assert len(read) == 1
    copies = read_back.copies

    def other(arrays):
        return {path: [(index, np.ones_like(part)) for index, part in parts] for path, parts in copies(arrays).items()}

    monkeypatch.setattr(read_back, "copies", other)
    with pytest.raises(CheckpointError, match=r"step 4 was not saved.*arrays read back differently.*step 3 is whole"):
        saved(tmp_path, (4,))
    assert RunCheckpoints(tmp_path, keep=5, read_only=True).all_steps() == (1, 2, 3)


def test_all_of_a_small_state_and_a_part_of_a_large_one_is_read_back(tmp_path):
    state = make_state(1, mesh_of(8))
    arrays = as_arrays(state)
    whole = read_back.copies(arrays)
    assert {path: sum(part.nbytes for _, part in parts) for path, parts in whole.items()} == {
        path: array.nbytes for path, array in arrays.items()
    }
    few = read_back.copies(arrays, budget=100)
    assert 0 < sum(arrays[path].nbytes for path in few) <= 100
    largest = {"x": jnp.ones(1000)}
    assert list(read_back.copies(largest, budget=1)) == ["x"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_not_one_byte_free_is_said_once_without_tracebacks_and_goes_on_with_room(tmp_path, capfd):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path]).returncode:
        pytest.skip("no mounts are allowed here")
    try:
        saved(tmp_path / "run")
        with open(tmp_path / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(bytes(4096))
        for _ in range(2):  # raised by the next call, or by the end
            with pytest.raises(CheckpointError, match=r"step 2 was not saved to .*No space left.*step 1 is whole"):
                saved(tmp_path / "run", (2,))
        (tmp_path / "filler").unlink()
        saved(tmp_path / "run", (2,))
        with RunCheckpoints(tmp_path / "run", keep=10) as checkpoints:
            assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(2))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err


def test_an_unreadable_metric_is_named_at_the_start(tmp_path):
    meta = saved(tmp_path) / "1" / "meta" / "metadata"
    meta.write_text(meta.read_text()[:-1])
    with pytest.raises(CheckpointError, match=r"(?s)/1 is damaged: meta.*Delete the folder"):
        RunCheckpoints(tmp_path, keep=1, best_metric="loss")


# Refusals


def test_a_state_that_differs_is_refused_with_its_paths(tmp_path):
    saved(tmp_path)
    target = abstract(make_state())
    struct = jax.ShapeDtypeStruct
    other = {
        "half": struct((8, 8), jnp.float32),  # Orbax would cast
        "odd": struct((5,), jnp.float32),
        "layers": target.trainable["layers"],
        "new": struct((1,), jnp.float32),
    }
    with RunCheckpoints(tmp_path, keep=1) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(target._replace(trainable=other))
    text = str(caught.value)
    assert "trainable/half: bfloat16[8, 8] in the checkpoint, float32[8, 8] in this run" in text
    assert "trainable/odd: float32[4] in the checkpoint, float32[5] in this run" in text
    assert "trainable/ids: in the checkpoint (int8[8]), not in this run" in text
    assert "trainable/new: in this run (float32[1]), not in the checkpoint" in text


def test_another_kind_of_key_is_refused(tmp_path):
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"key": jax.random.key(0)}, {})
        with pytest.raises(CheckpointError, match=r"key: key<fry>\[\] in the checkpoint, key<rbg>\[\]"):
            checkpoints.restore(jax.eval_shape(lambda: {"key": jax.random.key(0, impl="rbg")}))


def test_what_cannot_be_saved_is_refused(tmp_path):
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(CheckpointError, match="a/b is a ndarray"):
            checkpoints.save(1, {"a": {"b": np.ones(3)}}, {})
        with pytest.raises(CheckpointError, match="extra of step 1 is not JSON"):
            checkpoints.save(1, {"a": jnp.ones(3)}, {"x": {1, 2}})
        assert checkpoints.save(1, {"a": jnp.ones(3)}, {})
        with pytest.raises(CheckpointError, match=r"no whole step 7; it has \[1\]"):
            checkpoints.restore({"a": jax.ShapeDtypeStruct((3,), jnp.float32)}, step=7)
    with RunCheckpoints(tmp_path, keep=1, read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match="read-only"):
            checkpoints.save(2, {"a": jnp.ones(3)}, {})
    with pytest.raises(CheckpointError, match="other buckets must be mounted first"):
        RunCheckpoints("s3://bucket/run", keep=1)
    with pytest.raises(CheckpointError, match="keep=0"):
        RunCheckpoints(tmp_path, keep=0)


def test_of_several_steps_without_a_manifest_the_mend_is_for_the_newest(tmp_path):
    for step in ("4", "8", "12"):
        (tmp_path / step).mkdir()
        (tmp_path / step / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"but 4, 8, 12 without(?s:.*)manifest.write.* {tmp_path}/12\n"):
        folders.refuse_without_whole(tmp_path)


def test_errors_of_orbax_alone_are_kept_from_the_console(tmp_path, caplog):
    RunCheckpoints(tmp_path, keep=1).close()
    cause = (ValueError, ValueError("x"), None)
    logging.getLogger("asyncio").error("Task exception of site-packages/orbax/checkpoint/x.py", exc_info=cause)
    logging.getLogger("asyncio").error("Task exception of mine.py", exc_info=cause)
    assert [record.getMessage() for record in caplog.records] == ["Task exception of mine.py"]


def test_a_step_whose_save_failed_is_saved_again_while_its_threads_still_write(tmp_path, monkeypatch):
    saved(tmp_path)
    over, begun = threading.Event(), threading.Event()

    def write_on(folder):
        while not over.is_set():
            with contextlib.suppress(FileNotFoundError):  # the folder above it was removed in between
                os.makedirs(folder / "state", exist_ok=True)
            begun.set()

    def fail(path, **values):
        late.append(threading.Thread(target=write_on, args=(tmp_path / f"{path.name}.orbax-checkpoint-tmp",)))
        late[0].start()
        begun.wait()
        raise OSError(28, "No space left on device", str(path))

    late = []
    try:
        with RunCheckpoints(tmp_path, keep=10) as checkpoints:
            with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="step 2 was not .*No space left"):
                patch.setattr(checkpoints._orbax, "save", fail)
                checkpoints.save(2, make_state(2), EXTRA)
            checkpoints.save(2, make_state(2), EXTRA)
    finally:
        over.set()
        late[0].join()
    with RunCheckpoints(tmp_path, keep=10) as checkpoints:
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(2))
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]
