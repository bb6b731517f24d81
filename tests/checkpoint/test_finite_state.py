"""No step with a number that is not finite is ever declared whole, wherever in the state it is; nor is such a file
written.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.checkpoint.safetensors_writer import write_safetensors
from jaxft.checkpoint.tensors import TensorSpec
from jaxft.errors import CheckpointError, ExportError
from jaxft.optim.averages import with_average

TX = with_average(optax.adamw(1e-3), 0.9)


def state(devices=1):
    trainable = {"layers": {"kernel": jnp.arange(64.0).reshape(16, 4)}, "half": jnp.ones((8, 8), jnp.bfloat16)}
    whole = {"step": jnp.int32(3), "trainable": trainable, "opt_state": TX.init(trainable), "key": jax.random.key(0)}
    if devices == 1:
        return whole
    mesh = Mesh(jax.devices()[:devices], "fsdp")
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("fsdp") if x.ndim > 1 else P())), whole)


def spoiled(whole, part, value):
    """The state with one number replaced in the first array below `part` of its paths, in the last row."""
    done = []

    def spoil(path, x):
        if done or part not in jax.tree_util.keystr(path) or not x.ndim or x.dtype == jnp.int32:
            return x
        done.append(path)
        return jax.device_put(x.at[(-1,) * x.ndim].set(value), x.sharding)

    return jax.tree_util.tree_map_with_path(spoil, whole)


@pytest.mark.parametrize(
    ("part", "value"),
    [("kernel", jnp.nan), ("half", jnp.inf), (".mu", -jnp.inf), (".nu", jnp.inf), (".average", jnp.nan)],
)
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, part, value):
    # Small, in one folder: what is refused leaves nothing behind.
    with RunCheckpoints(tmp_path, keep=2) as checkpoints:
        match = r"step 3 is not saved: 1 of the \d+ arrays of its state have NaN or infinite values \(.*no earlier"
        with pytest.raises(CheckpointError, match=match) as refused:
            checkpoints.save(3, spoiled(state(), part, value), {})
        assert {".mu": "mu", ".nu": "nu", ".average": "average"}.get(part, part) in str(refused.value)
        assert "train.on_spike='skip'" in str(refused.value)
        assert checkpoints.latest_step() is None
    assert list(tmp_path.iterdir()) == []


def test_one_part_of_an_array_over_several_devices_is_enough(tmp_path):
    with RunCheckpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.save(2, state(8), {})
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"step 3 is not saved.*kernel.*step 2 is whole"):
            checkpoints.save(3, spoiled(state(8), "kernel", jnp.nan), {})
        assert checkpoints.all_steps() == (2,)


def test_largest_and_smallest_numbers_are_saved(tmp_path):
    extremes = jnp.array([jnp.finfo(jnp.float32).max, jnp.finfo(jnp.float32).min, -0.0, 1e-45], jnp.float32)
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.save(1, {"x": extremes, "n": jnp.arange(3)}, {})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_tensor_that_is_not_finite_is_not_written(tmp_path, dtype):
    with np.errstate(over="ignore"):
        values = np.array([1.0, 1e39], np.float64).astype(dtype)
    tensors = {"w": (TensorSpec((2,), np.dtype(dtype)), lambda index=(): values[index] if index else values)}
    with pytest.raises(ExportError, match=f"tensor 'w' has NaN or infinite values as {np.dtype(dtype)}"):
        write_safetensors(tmp_path / "model.safetensors", tensors)
    assert list(tmp_path.iterdir()) == []
