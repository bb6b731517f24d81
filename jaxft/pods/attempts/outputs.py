"""Where a run goes: a bucket or a folder that all hosts write, or the disk of one host, from which it is brought home.

Below --to are `run`, the run folder, `logs` and a copy of launch.json.
"""

import functools
import logging
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from jaxft.checkpoint import manifest
from jaxft.errors import BucketError, CheckpointError, PodError
from jaxft.files.atomic import flush_tree, make_folder, unfinished_folder, write_file
from jaxft.files.buckets import store
from jaxft.files.run_folder import CHECKPOINTS, LOCK
from jaxft.home import local_path
from jaxft.pods.attempts.hosts import HOST_ROOT, Hosts
from jaxft.pods.request import Request

RUN, LOGS = "run", "logs"
UNFINISHED = ("*.tmp", "*.partial", "*.saving-*", LOCK)  # in a run folder, while it is written

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Output(Protocol):
    """The place of a run.

    output_dir: the run folder as the hosts name it.
    """

    output_dir: str

    @property
    def to(self) -> str | None:
        """The place as the hosts see it, for upload_logs.sh; None if they do not."""
        ...

    def check(self) -> None:
        """Raises PodError if it is not there, before anything is created."""
        ...

    def newest(self) -> int | None:
        """The newest whole checkpoint that a new node could go on from. Raises PodError if that cannot be told."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file below --to. Raises PodError or OSError."""
        ...

    def read(self, name: str) -> bytes | None:
        """A small file below --to; None if there is none. Raises PodError or OSError."""
        ...

    def send(self, hosts: Hosts) -> None:
        """Before a start: gives the hosts what there is of the run, if they do not see it."""
        ...

    def bring(self, hosts: Hosts) -> int | None:
        """Brings home what is new on the hosts, if they do not write it there. Returns the newest whole checkpoint."""
        ...


def output_of(request: Request) -> Output:
    """The output of a request."""
    if request.is_remote:
        return Bucket(request.to.rstrip("/"))
    folder = Path(local_path(request.to)).absolute()
    return Mounted(folder) if request.shared else HostDisk(folder, request.name)


class Mounted:
    """A folder that every host and this machine mount under the same path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output_dir, self.to = str(folder / RUN), str(folder)

    def check(self) -> None:
        """See Output."""
        try:
            make_folder(self.folder)
        except OSError as error:
            raise PodError(
                f"{self.folder} cannot be made on this machine: {error}. Mount it here too, or give another --to"
            ) from error

    def newest(self) -> int | None:
        """See Output."""
        return _newest(self.folder / RUN)

    def write(self, name: str, content: bytes) -> None:
        """See Output."""
        make_folder((self.folder / name).parent)
        write_file(self.folder / name, lambda file: file.write(content))

    def read(self, name: str) -> bytes | None:
        """See Output."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def send(self, hosts: Hosts) -> None:
        """The hosts see the folder."""

    def bring(self, hosts: Hosts) -> int | None:
        """The hosts write the folder."""
        return self.newest()


class Bucket:
    """A folder in a bucket, which every host writes."""

    def __init__(self, to: str) -> None:
        self.to = to
        self.output_dir = f"{to}/{RUN}"
        self._objects = store.Bucket(to)

    def check(self) -> None:
        """See Output."""
        _of_bucket(self._objects.check)

    def newest(self) -> int | None:
        """See Output."""
        names = _of_bucket(lambda: self._objects.entries(f"{RUN}/{CHECKPOINTS}/"))
        steps = [name.split("/")[-2] for name in names if name.endswith(f"/{manifest.NAME}")]
        return max((int(step) for step in steps if step.isdigit()), default=None)

    def write(self, name: str, content: bytes) -> None:
        """See Output."""
        _of_bucket(lambda: self._objects.write(name, content))

    def read(self, name: str) -> bytes | None:
        """See Output."""
        content = _of_bucket(lambda: self._objects.read(name))
        return None if content is None else content.data

    def send(self, hosts: Hosts) -> None:
        """The hosts see the bucket."""

    def bring(self, hosts: Hosts) -> int | None:
        """The hosts write the bucket."""
        return self.newest()

    def copy_to(self, folder: Path) -> None:
        """Copies the run to a folder of this machine. Raises PodError, also if nothing of it is there."""
        entries = _of_bucket(lambda: self._objects.entries(f"{RUN}/"))
        if not entries:
            raise PodError(f"nothing is in {self.output_dir} yet: `jaxft pod status NAME` shows what the run does")
        for name, entry in entries.items():
            if name.endswith("/") or name.rpartition("/")[2] == LOCK:  # a mark of a folder; who writes there now
                continue
            path = folder / name.removeprefix(f"{RUN}/")
            _of_bucket(functools.partial(self._objects.download, name, path, entry.size))


class HostDisk:
    """A folder of this machine, for a run of one host, which writes on its own disk.

    What is whole there is brought home after each new checkpoint, so that a new node can go on from it.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder
        self._on_host = f"{HOST_ROOT}/runs/{run}/output"
        self.output_dir = f"~/{self._on_host}"
        self.at_home = Mounted(folder)

    def check(self) -> None:
        """See Output."""
        self.at_home.check()

    @property
    def to(self) -> str | None:
        """The host does not see this machine."""
        return None

    def newest(self) -> int | None:
        """See Output."""
        self._settle()
        return self.at_home.newest()

    def write(self, name: str, content: bytes) -> None:
        """See Output."""
        self.at_home.write(name, content)

    def read(self, name: str) -> bytes | None:
        """See Output."""
        return self.at_home.read(name)

    def send(self, hosts: Hosts) -> None:
        """See Output. A host that has the run already keeps its own, which is at least as new."""
        self._settle()
        worker = hosts.workers[0]
        run = self.folder / RUN
        if not run.is_dir() or hosts.slices.ssh(worker, ["test", "-d", self._on_host]).code == 0:
            return
        target = f"{self._on_host}.tar"
        with tempfile.TemporaryDirectory() as scratch:
            archive = Path(scratch) / "run.tar"
            with tarfile.open(archive, "w") as file:
                file.add(run, arcname="output")
            hosts.on(worker, ["mkdir", "-p", str(Path(target).parent)])
            copied = hosts.repeated(lambda: hosts.slices.copy(worker, archive, target))
            if copied.code != 0:
                raise hosts.error(worker, ["copy", target], copied)
        # Unpacked under another name, so that a broken connection leaves no half of a run.
        unpacked = f"{self._on_host}.partial"
        hosts.on(worker, ["rm", "-rf", unpacked])
        hosts.on(worker, ["mkdir", unpacked])
        hosts.on(worker, ["tar", "-xf", target, "-C", unpacked], seconds=3600)
        hosts.on(worker, ["mv", "-T", f"{unpacked}/output", self._on_host])
        hosts.on(worker, ["rm", "-rf", target, unpacked])

    def bring(self, hosts: Hosts) -> int | None:
        """See Output. Raises PodError if it cannot be brought whole; what is here already stays then."""
        with hosts.attended():
            return self._bring(hosts)

    def _bring(self, hosts: Hosts) -> int | None:
        self._settle()
        worker = hosts.workers[0]
        if hosts.slices.ssh(worker, ["test", "-d", self._on_host]).code != 0:
            return self.newest()
        excluded = [f"--exclude={pattern}" for pattern in UNFINISHED]
        source = f"{self._on_host}.tar"
        # While the run goes on files change as they are read, which tar tells with code 1 and the check below finds.
        argv = ["tar", "-cf", source, *excluded, "-C", str(Path(self._on_host).parent), "output"]
        packed = hosts.repeated(lambda: hosts.slices.ssh(worker, argv, seconds=3600))
        if packed.code not in (0, 1):
            raise hosts.error(worker, argv, packed)
        next_run = unfinished_folder(self.folder / RUN)
        shutil.rmtree(next_run, ignore_errors=True)
        make_folder(next_run)
        archive = next_run.with_name("run.tar")
        try:
            fetched = hosts.repeated(lambda: hosts.slices.fetch(worker, source, archive))
            if fetched.code != 0:
                raise hosts.error(worker, ["fetch", source], fetched)
            _unpack(archive, next_run)
            newest = _newest(next_run / "output")
            if newest is not None:
                manifest.verify(next_run / "output" / CHECKPOINTS / str(newest))
        except CheckpointError as error:
            raise PodError(f"the run was not brought home whole: {error}") from error
        finally:
            archive.unlink(missing_ok=True)
        before = self.at_home.newest()
        if (newest or 0) >= (before or 0):
            self._replace(next_run / "output")
            return newest
        shutil.rmtree(next_run)
        return before

    def _replace(self, unpacked: Path) -> None:
        """Puts a whole run in the place of the last one; a kill between leaves both for `_settle`."""
        flush_tree(unpacked)
        run, before = self.folder / RUN, self.folder / "run.before"
        shutil.rmtree(before, ignore_errors=True)
        if run.exists():
            os.rename(run, before)
        os.rename(unpacked, run)
        shutil.rmtree(before, ignore_errors=True)
        shutil.rmtree(unpacked.parent, ignore_errors=True)

    def _settle(self) -> None:
        """After a kill while a run took the place of the last one: the last one comes back."""
        run, before = self.folder / RUN, self.folder / "run.before"
        if before.is_dir() and not run.exists():
            os.rename(before, run)


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise PodError(f"what came from the host is no whole archive: {error}. Give the same command again.") from error


def _newest(run: Path) -> int | None:
    steps = [path.parent.name for path in (run / CHECKPOINTS).glob(f"*/{manifest.NAME}")]
    return max((int(step) for step in steps if step.isdigit()), default=None)


def _of_bucket(action: Callable[[], Result]) -> Result:
    try:
        return action()
    except (BucketError, FileNotFoundError) as error:  # an object that was deleted while all of them were read
        raise PodError(str(error)) from error


def keep_copy(output: Output, name: str) -> Callable[[str], None]:
    """Writes a text beside the run; a failure is told once and ends nothing, since the text is on this machine too."""
    failed: list[str] = []

    def copy(text: str) -> None:
        try:
            output.write(name, text.encode())
        except (PodError, OSError) as error:
            if not failed:
                log.warning("%s is not written beside the run: %s", name, error)
            failed.append(name)

    return copy
