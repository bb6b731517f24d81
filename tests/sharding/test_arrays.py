"""Batches made row by row on a mesh, and arrays brought back. One process here; several in tests/runs."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.config import MeshConfig
from jaxft.data.batch import Batch
from jaxft.hardware.groups import collectives
from jaxft.hardware.hlo import parse
from jaxft.sharding import arrays, make_mesh_plan
from jaxft.sharding.arrays import from_rows, host_parts, put_global, to_host

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
    put = jax.device_put(whole, plan.batch_sharding())
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(put), strict=True):
        assert ours.sharding == theirs.sharding and ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_keys_and_numbers_spread_over_a_mesh_and_come_back() -> None:
    mesh = make_mesh_plan(MeshConfig()).mesh
    x = np.arange(16, dtype=np.float32).reshape(8, 2)
    there = put_global(jax.numpy.asarray(x), NamedSharding(mesh, P("fsdp")))
    assert there.sharding.spec == P("fsdp")
    np.testing.assert_array_equal(to_host(there), x)
    key = jax.random.key(3)
    assert jax.random.uniform(put_global(key, NamedSharding(mesh, P()))) == jax.random.uniform(key)


CUTS = [((1, 2), (0, 16), (0, 8)), ((2, 3), (4, 12), (0, 8)), ((0, 3), (3, 5), (1, 7)), ((0, 1), (0, 1), (0, 1))]


@pytest.mark.parametrize("bounds", CUTS)
@pytest.mark.parametrize("spec", [P(), P(None, "fsdp"), P(None, "fsdp", "tensor"), P(None, None, ("fsdp", "tensor"))])
def test_a_block_comes_to_the_host_from_its_shards_or_through_all_devices(bounds: tuple, spec: P) -> None:
    mesh = make_mesh_plan(MeshConfig(fsdp=4, tensor=2)).mesh
    x = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32)
    there, index = jax.device_put(x, NamedSharding(mesh, spec)), tuple(slice(*cut) for cut in bounds)
    wanted = x[index].astype(jax.numpy.bfloat16)
    out, filled = np.zeros(wanted.shape, wanted.dtype), np.zeros(wanted.shape, int)
    for place, part in host_parts(there, bounds, "bfloat16"):
        out[place] = part
        filled[place] += 1
    assert (filled == 1).all()
    np.testing.assert_array_equal(out, wanted)
    assert there._npy_value is None
    # What several processes do.
    np.testing.assert_array_equal(np.asarray(arrays._gather_block(there, bounds, "bfloat16")), wanted)


def test_no_more_than_a_block_is_gathered_where_the_cut_axis_is_split() -> None:
    mesh, shape = make_mesh_plan(MeshConfig(fsdp=8)).mesh, (4, 64, 32)
    x = jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    arguments = (np.zeros(3, np.int32), (None, (16, 32), None), (1, 16, 32), np.dtype(np.float32))
    compiled = arrays._cut_and_gather.lower(x, *arguments, NamedSharding(mesh, P())).compile()
    module = parse(compiled.as_text())
    sizes = [array.elements for kind in ("all-gather", "all-reduce") for array, _ in collectives(module, kind, 8)]
    assert sizes and max(sizes) <= 16 * 32, sizes
