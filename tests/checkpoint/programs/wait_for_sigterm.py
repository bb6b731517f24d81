"""Steps from the given one on until a SIGTERM is noticed, saves that step, prints it and leaves with 0.

The first step takes the given number of seconds, as one does that is compiled.
"""

import sys
import time

import jax.numpy as jnp

from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.sharding import distributed

if not distributed.start() or distributed.start():
    sys.exit("start must be done once")
checkpoints = RunCheckpoints(sys.argv[1], keep=1)
first, seconds = int(sys.argv[2]), float(sys.argv[3])
print("stepping", flush=True)
time.sleep(seconds)
for step in range(first, first + 2000):
    time.sleep(0.02)
    if distributed.reached_preemption():
        checkpoints.save(step, {"x": jnp.float32(step)}, {})
        checkpoints.close()
        print(step)
        sys.exit(0)
sys.exit("SIGTERM was not noticed")
