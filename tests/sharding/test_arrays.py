"""Batches made row by row on a mesh, and arrays brought back. One process here; several in tests/runs."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.config import MeshConfig
from jaxft.data.batch import Batch
from jaxft.sharding import make_mesh_plan
from jaxft.sharding.arrays import from_rows, spread, to_host

ROWS = 8


def batch() -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        *(rng.integers(0, 9, (ROWS, 3)).astype(t) for t in (np.int32, np.int32, np.float32, np.int32, np.int32))
    )


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "context": 2}, {"tensor": 4, "fsdp": 2}])
def test_a_batch_from_rows_is_the_whole_batch_on_the_mesh(axes: dict[str, int]) -> None:
    plan, whole, made = make_mesh_plan(MeshConfig(**{"fsdp": 1} | axes)), batch(), []

    def make(rows: slice) -> Batch:
        made.append((rows.start, rows.stop))
        return jax.tree.map(lambda x: x[rows], whole)

    found = from_rows(make, ROWS, plan.batch_sharding())
    # Each row once, however many devices hold it.
    assert made == [(i, i + ROWS // plan.batch_shards) for i in range(0, ROWS, ROWS // plan.batch_shards)]
    for ours, theirs in zip(found, jax.device_put(whole, plan.batch_sharding()), strict=True):
        assert ours.sharding == theirs.sharding and ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_keys_and_numbers_spread_over_a_mesh_and_come_back() -> None:
    mesh = make_mesh_plan(MeshConfig()).mesh
    x = np.arange(16, dtype=np.float32).reshape(8, 2)
    there = spread(jax.numpy.asarray(x), NamedSharding(mesh, P("fsdp")))
    assert there.sharding.spec == P("fsdp")
    np.testing.assert_array_equal(to_host(there), x)
    key = jax.random.key(3)
    assert jax.random.uniform(spread(key, NamedSharding(mesh, P()))) == jax.random.uniform(key)
