"""One of two processes with two devices each: save, restore, refuse damage together, leave together on SIGTERM."""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.config import MeshConfig
from jaxft.errors import CheckpointError
from jaxft.sharding import distributed, make_mesh_plan

folder, port, index = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
distributed.start(f"127.0.0.1:{port}", 2, index)
sharding = NamedSharding(make_mesh_plan(MeshConfig()).mesh, P("fsdp"))
whole = np.arange(32, dtype=np.float32).reshape(8, 4)
x = jax.make_array_from_callback(whole.shape, sharding, lambda where: whole[where])

checkpoints = RunCheckpoints(folder, keep=1)
for step in (1, 2):
    checkpoints.save(step, {"x": x}, {"step": step})
target = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}
state, extra = checkpoints.restore(target)
if extra != {"step": 2} or checkpoints.all_steps() != (2,):
    sys.exit(f"restored {extra} of {checkpoints.all_steps()}")
for shard in state["x"].addressable_shards:
    np.testing.assert_array_equal(shard.data, whole[shard.index])

damaged = folder / "2" / "state" / "_sharding"
good = damaged.read_bytes()
jax.experimental.multihost_utils.sync_global_devices("read")
if index == 0:
    damaged.write_bytes(good[:-1])
try:
    checkpoints.restore(target)
    sys.exit("damage was restored")
except CheckpointError:
    pass
if index == 0:
    damaged.write_bytes(good)

print("stepping", flush=True)
total = jax.jit(jnp.sum)
for step in range(3, 5_000):
    total(x).block_until_ready()  # keeps the processes in step, as training does
    time.sleep(0.01)  # else all steps are over before the processes agree on one
    if distributed.reached_preemption():
        checkpoints.save(step, {"x": x}, {"step": step})
        checkpoints.close()
        print(step, flush=True)
        sys.exit(0)
sys.exit("SIGTERM was not noticed")
