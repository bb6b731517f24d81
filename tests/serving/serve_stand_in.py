"""A server as a program: STATE MODEL WORKER. It says its port once it answers, and that it has not imported JAX."""

import sys
from pathlib import Path

from jaxft.serving.serve import Parts, serve
from jaxft.serving.settings import ServeSettings
from jaxft.serving.supervision.supervisor import Limits

state, model, worker = sys.argv[1:]
is_real = "/" not in worker
command = (sys.executable, "-m", worker) if is_real else (sys.executable, "-S", worker)
parts = Parts(
    worker=command,
    limits=Limits(look=0.25 if is_real else 0.02, kill=1.0, drain=60.0),
    on_ready=lambda port, stop: print(f"port {port}", flush=True),
)
settings = ServeSettings(models={"tiny": model}, state=Path(state), port=0)
serve(settings, lambda text: print(text, flush=True), parts)
sys.exit(99 if "jax" in sys.modules else 0)
