"""RunCheckpoints: exact, verified, and bounded in number."""

import os
import random
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.checkpoint.resume import RunCheckpoints
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


def test_without_a_manifest_a_step_is_ignored_and_cleaned_at_the_next_start(tmp_path, caplog):
    saved(tmp_path, (1, 2))
    (tmp_path / "2" / "manifest.json").unlink()
    (tmp_path / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "0.deleted" / "state").mkdir(parents=True)
    (tmp_path / "2024").mkdir()  # looks like a step, but Orbax never wrote it
    with RunCheckpoints(tmp_path, keep=10, read_only=True) as reader:
        assert reader.all_steps() == (1,)
        assert len(os.listdir(tmp_path)) == 5
    with RunCheckpoints(tmp_path, keep=10) as checkpoints:
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(1))
    assert sorted(os.listdir(tmp_path)) == ["1", "2024"]
    assert caplog.text.count("was interrupted") == 3


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
    with pytest.raises(CheckpointError, match="mount the bucket"):
        RunCheckpoints("gs://bucket/run", keep=1)
    with pytest.raises(CheckpointError, match="keep=0"):
        RunCheckpoints(tmp_path, keep=0)
