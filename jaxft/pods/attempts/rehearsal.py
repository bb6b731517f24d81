"""What a dry run needs in place of hosts and buckets: answers as if all went well, and nothing kept."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.pods.attempts.outputs import Bucket, HostDisk, Mounted, Output
from jaxft.pods.command import Done
from jaxft.pods.machines import chips_of_host
from jaxft.pods.request import Request
from jaxft.pods.slices import Slices, Worker


class HostAnswers:
    """How commands on hosts end in a dry run, by their argv."""

    def __init__(self, request: Request) -> None:
        self._chips = chips_of_host(request.shape)

    def __call__(self, argv: Sequence[str]) -> Done:
        """The answer to one command: an archive is not there yet, and every attempt ends well at once."""
        if argv[0] == "sha256sum":
            return Done(1, "", "no such file")
        if argv[0] == "bash" and argv[1].endswith("/state.sh"):
            started = len(argv) > 3
            state: dict[str, Any] = {"attempt": int(argv[3]) if started else 0, "exit": 0 if started else None}
            state |= {"chips": self._chips, "disk_free": 10**12, "environment": "equal"}
            return Done(0, json.dumps(state), "")
        return Done(0, "", "")


class RehearsedSlices:
    """Slices whose files are not there: a fetched file is an archive of an empty run."""

    def __init__(self, slices: Slices) -> None:
        self._slices = slices

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slices, name)

    def fetch(self, worker: Worker, source: str, target: Path) -> Done:
        """Prints the command, and writes the archive."""
        done = self._slices.fetch(worker, source, target)
        with tarfile.open(target, "w") as file:
            folder = tarfile.TarInfo("output")
            folder.type = tarfile.DIRTYPE
            folder.mode = 0o755
            file.addfile(folder, io.BytesIO())
        return done


class RehearsedBucket(Bucket):
    """A bucket that is neither read nor written."""

    def newest(self) -> int | None:
        """There is no checkpoint."""
        return None

    def write(self, name: str, content: bytes) -> None:
        """Writes nothing."""

    def read(self, name: str) -> bytes | None:
        """There is no file."""
        return None


def rehearsed_output(request: Request, scratch: Path) -> Output:
    """The output of a dry run, which writes below `scratch` alone, and names the real place to the hosts."""
    if request.is_remote:
        return RehearsedBucket(request.to.rstrip("/"))
    if not request.shared:
        return HostDisk(scratch, request.name)
    output = Mounted(scratch)
    output.output_dir, output.to = str(Path(request.to) / "run"), request.to
    return output
