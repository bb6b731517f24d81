"""`jaxft pod run` over folders as hosts, as a process that a test can kill: stub_pod.py FOLDER PORT.

The cloud outlives the process, as Google's does: whether the machines are alive is a file. STUB_POD in the environment
has options of `slices_in` as JSON. Before each call that reaches the cloud or a host, its event is printed after a #.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from fake_train import fake_environment
from stub_slices import StubSlices

from jaxft.config import load
from jaxft.pods.attempts.front import Outside
from jaxft.pods.request import Request
from jaxft.pods.run import run

# What is compared is the last checkpoint, so that no export is needed.
CONFIG = {
    "data.eval": None,
    "eval.metric": None,
    "export.merged": False,
    "export.adapter": False,
    "checkpoint.every": 1,
    "train.steps": 4,
    "train.log_every": 1,
}


class PrintedEvents(list[str]):
    """Events that another process can wait for."""

    def append(self, event: str) -> None:
        print(f"# {event}", flush=True)
        super().append(event)


class LastingSlices(StubSlices):
    """Slices that another process finds again. `alive` and `gone` are files with the number of the last creation."""

    def __init__(self, folder: Path, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, **options)
        numbers = [int(path.read_text()) for name in ("alive", "gone") if (path := folder / name).exists()]
        self.incarnation = max(numbers, default=0)
        self.events = PrintedEvents()

    @property
    def alive(self) -> bool:
        return (self.folder / "alive").exists()

    @alive.setter
    def alive(self, value: bool) -> None:
        write_whole(self.folder / ("alive" if value else "gone"), str(self.incarnation))
        if not value:
            (self.folder / "alive").unlink(missing_ok=True)

    def create(self) -> None:
        if not self.alive:
            # A process that was killed while it made the folders has created nothing.
            shutil.rmtree(self.folder / str(self.incarnation + 1), ignore_errors=True)
        super().create()


def write_whole(path: Path, text: str) -> None:
    """Writes a small file, of which another process sees nothing or all."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def slices_in(
    folder: Path, hosts: tuple[int, ...] = (1, 1), env: dict[str, str] | None = None, played: bool = False,
    **options: Any,
) -> LastingSlices:  # fmt: skip
    """The slices below a folder. env: for the hosts, besides what all have. played: training is fake_train.py."""
    # Hosts begin with empty homes, and compile the same programs in every run of these tests.
    kept = Path(os.environ["JAXFT_CACHE"]) / "pods"
    shared = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(kept / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "MPLCONFIGDIR": str(kept / "fonts"),
    }
    if played:
        environment = folder / "environment"
        shared["JAXFT_PYTHON_ENV"] = str(environment) if environment.exists() else fake_environment(folder)
        shared |= {"FAKE_STEPS": "4", "FAKE_SECONDS": "0.5"}
    return LastingSlices(folder / "nodes", hosts=tuple(hosts), chips=4, env=shared | (env or {}), **options)


def request_in(folder: Path, hosts: tuple[int, ...] = (1, 1), **options: Any) -> Request:
    """The request for such slices. One host writes on its own disk."""
    return Request(
        **{
            "name": "run-1", "topology": "v6e:2x2", "slices": len(hosts), "zones": ("us-east5-b",),
            "to": str(folder / "to"), "shared": len(hosts) > 1, "max_hours": 4.0, "skip_plan": True,
            "keep_minutes": 0.0, **options,
        }
    )  # fmt: skip


def lead_in(folder: Path, port: int, slices: StubSlices, lines: list[str], **options: Any) -> dict:
    """`jaxft pod run` in this process; the records of the run are below HOME. options: of the request."""

    def say(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    outside = Outside(say=say, slices_of=lambda request, **rest: slices, platform="cpu", port=port, poll_seconds=0.5)
    request = request_in(folder, slices.hosts, **options)
    return run(request, load("quickstart:smoke", CONFIG), say=say, outside=outside)


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    lead_in(FOLDER, int(sys.argv[2]), slices_in(FOLDER, **json.loads(os.environ.get("STUB_POD", "{}"))), [])
