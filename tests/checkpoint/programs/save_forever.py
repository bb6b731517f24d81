"""Saves a small state at every step, going on from the newest, until it is killed."""

import sys

import jax
import jax.numpy as jnp

from jaxft.checkpoint.resume import RunCheckpoints

checkpoints = RunCheckpoints(sys.argv[1], keep=1)
found = checkpoints.restore({"x": jax.ShapeDtypeStruct((64, 64), jnp.float32)})
step = found[1]["step"] if found else 0
while True:
    step += 1
    checkpoints.save(step, {"x": jnp.full((64, 64), step, jnp.float32)}, {"step": step})
    print("saving", flush=True)
