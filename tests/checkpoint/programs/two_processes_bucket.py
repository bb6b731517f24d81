"""One of two processes with two devices each: restores from a bucket what is there, then saves two steps more."""

import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.config import MeshConfig
from jaxft.sharding import distributed, make_mesh_plan

address, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
distributed.start(f"127.0.0.1:{port}", 2, index)
sharding = NamedSharding(make_mesh_plan(MeshConfig()).mesh, P("fsdp"))


def array(step):
    whole = np.arange(2048, dtype=np.float32).reshape(8, 256) + step
    return jax.make_array_from_callback(whole.shape, sharding, lambda where: whole[where])


checkpoints = RunCheckpoints(address, keep=1)
restored = checkpoints.restore({"x": jax.ShapeDtypeStruct((8, 256), np.float32, sharding=sharding)})
first = restored[1]["step"] if restored else 0
if restored:
    for shard, expected in zip(restored[0]["x"].addressable_shards, array(first).addressable_shards, strict=True):
        np.testing.assert_array_equal(shard.data, expected.data)
for step in (first + 1, first + 2):
    checkpoints.save(step, {"x": array(step)}, {"step": step})
checkpoints.close()
print(first, flush=True)
