"""Saves one step, with a deadline of 3 s for connections over which nothing comes; prints the seconds that it took."""

import os
import sys
import time

import jax.numpy as jnp

os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = "3"

from jaxft.checkpoint.resume import RunCheckpoints

begun = time.monotonic()
with RunCheckpoints(sys.argv[1], keep=1) as checkpoints:
    checkpoints.save(1, {"x": jnp.ones((64, 64), jnp.float32)}, {"step": 1})
print(time.monotonic() - begun)
