"""`jaxft pod run` over folders as hosts, as a process that a test can kill: stub_pod.py FOLDER PORT.

The cloud outlives the process, as Google's does: whether the machines are alive is a file.
"""

import sys
from pathlib import Path

from stub_slices import StubSlices

from jaxft.config import load
from jaxft.pods.attempts.front import Outside
from jaxft.pods.request import Request
from jaxft.pods.run import run

CONFIG = {
    "data.eval": None,
    "eval.metric": None,
    "export.merged": False,
    "checkpoint.every": 1,
    "train.steps": 4,
    "train.log_every": 1,
}


class LastingSlices(StubSlices):
    """Slices that another process finds again."""

    def __init__(self, folder: Path, **options) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, **options)
        self.incarnation = len(list(folder.glob("[0-9]*")))

    @property
    def alive(self) -> bool:
        return (self.folder / "alive").exists()

    @alive.setter
    def alive(self, value: bool) -> None:
        if value:
            (self.folder / "alive").touch()
        else:
            (self.folder / "alive").unlink(missing_ok=True)


def slices_in(folder: Path) -> LastingSlices:
    return LastingSlices(
        folder / "nodes", hosts=(1, 1), chips=4, env={"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    )


def request_in(folder: Path) -> Request:
    return Request(
        name="run-1", topology="v6e:2x2", slices=2, zones=("us-east5-b",), to=str(folder / "to"), shared=True,
        max_hours=4.0, skip_plan=True, keep_minutes=0.0,
    )  # fmt: skip


def lead_in(folder: Path, port: int, slices: StubSlices, lines: list[str], poll: float = 0.5, **options) -> dict:
    """`jaxft pod run` in this process; the records of the run are below HOME."""

    def say(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    outside = Outside(
        say=say, slices_of=lambda request, **rest: slices, platform="cpu", port=port, poll_seconds=poll, **options
    )
    return run(request_in(folder), load("quickstart:smoke", CONFIG), say=say, outside=outside)


if __name__ == "__main__":
    lead_in(Path(sys.argv[1]), int(sys.argv[2]), slices_in(Path(sys.argv[1])), [])
