"""Steps until a SIGTERM is noticed, saves that step, prints it and leaves with 0."""

import sys
import time

import jax.numpy as jnp

from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.sharding import distributed

if not distributed.start() or distributed.start():
    sys.exit("start must be done once")
checkpoints = RunCheckpoints(sys.argv[1], keep=1)
print("stepping", flush=True)
for step in range(1, 2000):
    time.sleep(0.02)
    if checkpoints.reached_preemption(step):
        checkpoints.save(step, {"x": jnp.float32(step)}, {})
        checkpoints.close()
        print(step)
        sys.exit(0)
sys.exit("SIGTERM was not noticed")
