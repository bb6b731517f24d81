"""The devices that JAX sees, looked at by another process with a deadline.

On a slice of several hosts the driver waits for the other hosts, and JAX has no way to stop waiting; a process can be
ended. It also gives the chips back when it ends.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from jaxft.doctor.part import Part
from jaxft.errors import counted

SECONDS = 60.0  # the first start of libtpu on a host takes up to half of it
# What is printed is the last line: libraries may print before it.
LOOK = """
import collections, json
import jax
try:
    devices = jax.devices()
    seen = {
        "platform": jax.default_backend(), "devices": len(devices), "local_devices": jax.local_device_count(),
        "processes": jax.process_count(), "kinds": dict(collections.Counter(one.device_kind for one in devices)),
    }
except RuntimeError as error:
    seen = {"error": str(error)}
print(json.dumps(seen), flush=True)
"""


def examine(seconds: float = SECONDS, *, hosts: int = 1, chips: int = 0, gpus: int = 0) -> Part:
    """The platform and the devices of JAX in a process of its own.

    hosts: how many the slice has, as far as is known. chips, gpus: what this machine has, which JAX should use.
    """
    seen = _look(seconds)
    if seen is None:
        return _silent(seconds, hosts)
    if "error" in seen:
        return Part(
            name="devices",
            text=f"JAX cannot start: {' '.join(seen['error'].split())[:600]}",
            value=seen,
            mend="Mend what the other parts say, or unset JAX_PLATFORMS if it names a platform that is not here.",
        )
    kinds = ", ".join(f"{count} x {kind}" for kind, count in seen["kinds"].items())
    text = f"{seen['platform']}: {kinds}"
    if seen["devices"] != seen["local_devices"]:
        text += f", of which {seen['local_devices']} are here"
    return Part(name="devices", text=text, value=seen, mend=_unused(seen["platform"], chips, gpus))


def not_examined(why: str) -> Part:
    """The part if JAX was not started."""
    return Part(name="devices", text=f"not looked at: {why}")


def _unused(platform: str, chips: int, gpus: int) -> str | None:
    """What to do if this machine has accelerators and JAX uses the CPU."""
    if platform != "cpu" or not (chips or gpus):
        return None
    what, extra = (counted(chips, "TPU chip"), "tpu") if chips else (counted(gpus, "GPU"), "cuda")
    if os.environ.get("JAX_PLATFORMS"):
        return f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} keeps JAX from the {what} of this machine: unset it."
    return f"JAX does not use the {what} of this machine: run pip install 'jaxft[{extra}]'."


def _silent(seconds: float, hosts: int) -> Part:
    """The part if JAX did not start in time."""
    if hosts > 1:
        text = (
            f"not known: JAX did not start within {seconds:g} s. This is one of {hosts} hosts of a slice, and waits "
            "for the others; give the command on all of them at the same time"
        )
        return Part(name="devices", text=text)
    return Part(
        name="devices",
        text=f"JAX did not start within {seconds:g} s",
        mend=(
            "If this is one host of a slice, give the command on all hosts at the same time. Else see who holds the "
            "accelerator (part tpu or gpu), give it more time with --seconds, or restart the machine."
        ),
    )


def _look(seconds: float) -> dict[str, Any] | None:
    """What JAX sees in a process of its own; None if it does not end in time."""
    package = str(Path(__file__).parents[2])
    paths = [package, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    child = subprocess.Popen(
        [sys.executable, "-c", LOOK], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # also what it started, which may hold the chips
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    lines = out.strip().splitlines()
    if child.returncode or not lines:
        return {"error": err.strip()[-2000:] or f"the process ended with {child.returncode}"}
    return json.loads(lines[-1])
