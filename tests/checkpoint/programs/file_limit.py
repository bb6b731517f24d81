"""Saves step 1, forbids files above 64 KB, saves a larger step 2 and prints the error as JSON."""

import json
import resource
import signal
import sys

import jax

from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.errors import CheckpointError

state = {"x": jax.random.normal(jax.random.key(0), (512, 512))}
checkpoints = RunCheckpoints(sys.argv[1], keep=5)
checkpoints.save(1, state, {})
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with EFBIG instead of a kill
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
checkpoints.save(2, state, {})
try:
    checkpoints.save(3, state, {})
except CheckpointError as error:
    print(json.dumps(str(error)))
    checkpoints.close()
    sys.exit(0)
sys.exit("no error")
