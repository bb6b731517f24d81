"""The steps of a run in a bucket of Google Cloud Storage.

A bucket cannot rename: what would be a rename is a copy of every object. So a step is written under its own name, and
its manifest, which is the last object, makes it whole. An object `<step>.saving` is there before the first object of a
step and until its manifest is; `<step>.deleted` before a manifest is deleted and until everything is. So objects
without a manifest are known as leftovers of ours by these two, and are not touched otherwise.

Every process sends its own shards to the bucket, through TensorStore; nothing is kept on a local disk. Small objects
go through gcsfs. Both repeat requests that the bucket answers with 429 or 5xx, and those whose connection breaks.
"""

import json
import logging
import os
import re
import socket
from collections.abc import Mapping
from typing import Any

from jaxft.checkpoint import manifest
from jaxft.checkpoint.steps import folders
from jaxft.checkpoint.steps.bucket_objects import Objects, refusal
from jaxft.errors import CheckpointError

PREFIX = "gs://"
SPECIAL = re.compile(r"[\[\]*?{}\\|%#\s]")  # patterns and other syntax to the libraries below
SAVING, DELETED = ".saving", ".deleted"
ACCESS = ".access-"  # with the number of a process: an object by which it tries whether it may write

log = logging.getLogger(__name__)


def is_bucket(folder: object) -> bool:
    """Whether a path is an address of any kind of bucket or server, and not a local path."""
    return "://" in str(folder)


class BucketSteps:
    """See `access.Steps`. Raises CheckpointError for an address that is not `gs://BUCKET/FOLDER`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder.rstrip("/")
        if not re.fullmatch(r"gs://[^/]+/.+", self.folder):
            raise CheckpointError(
                f"{folder}: checkpoints go to a local or mounted folder, or to gs://BUCKET/FOLDER in a bucket of "
                "Google Cloud Storage. Give one of these; other buckets must be mounted first."
            )
        if special := sorted(set(SPECIAL.findall(self.folder))):
            raise CheckpointError(
                f"{folder} has {' '.join(map(repr, special))} in its name, which the libraries that write to buckets "
                "take for a pattern or another syntax. Choose a name without these characters."
            )
        self._objects = Objects(self.folder)
        self._begun: set[int] = set()  # by this process, whole or not

    @property
    def mend(self) -> str:
        return f"Check that {self._objects.bucket} can be reached and written"

    def whole(self) -> tuple[int, ...]:
        return tuple(sorted(step for step, names in self._steps().items() if manifest.NAME in names))

    def without_manifest(self) -> tuple[int, ...]:
        steps, leftovers = self._steps(), self._leftovers()
        return tuple(sorted(step for step in steps.keys() - leftovers.keys() if manifest.NAME not in steps[step]))

    def others(self) -> tuple[str, ...]:
        first = {name.partition("/")[0] for name in self._objects.names()}
        known = re.compile(rf"\d+|{re.escape(ACCESS)}\d+", re.ASCII)  # a killed process may have left the latter
        return tuple(sorted(name for name in first if not known.fullmatch(name)))

    def exists(self, step: int) -> bool:
        return step in self._steps()

    def path(self, step: int) -> Any:
        from etils import epath

        return epath.Path(f"{self.folder}/{step}")

    def check_names(self) -> None:
        """Also refuses objects of a step without a manifest that no interrupted save of ours has left."""
        steps, leftovers = self._steps(), self._leftovers()
        for step, names in sorted(steps.items()):
            if manifest.NAME in names:
                try:
                    meta = self.read_meta(step)
                except CheckpointError:  # it is refused if it is to be restored
                    continue
                self.check_number(step, meta)
            elif step not in leftovers and folders.ORBAX_MARK in names:
                raise CheckpointError(_unexplained(self.folder, step))

    def refuse_without_whole(self) -> None:
        """Nothing: `check_names` refuses every step without a manifest."""

    def prepare(self) -> None:
        self.check_names()
        steps = self._steps()
        for step, mark in sorted(self._leftovers().items()):
            if mark == SAVING and manifest.NAME in steps.get(step, ()):
                self._objects.delete([f"{step}{mark}"])  # all but this was done
                continue
            log.warning("removing %s/%d: writing or deleting it was interrupted", self.folder, step)
            self._remove(step, mark)

    def check_access(self) -> None:
        import jax  # here: runs are listed without it

        self._objects.check_access(f"{ACCESS}{jax.process_index()}")

    def begin(self, step: int, number: int) -> Any:
        if step in self._begun:
            raise CheckpointError(
                f"step {step} failed to be saved to {self.folder} before, and parts of it may still arrive there. Save "
                "a later step, or end this program and run the same command again."
            )
        from jaxft.sharding.processes import is_primary

        if is_primary():
            who = {"host": socket.gethostname(), "pid": os.getpid(), "save": number}
            self._objects.write(f"{step}{SAVING}", json.dumps(who).encode())
        self._begun.add(step)
        return self.path(step)

    def flush(self, step: int, number: int) -> None:
        """Nothing: an object is safe when the bucket has answered, and Orbax has waited for all processes."""

    def publish(self, step: int, number: int, summing: manifest.Summing) -> None:
        # The bucket states the checksums of its objects.
        digests = self._objects.digests(f"{step}/", manifest.OF_BUCKETS)
        text = manifest.text_of(manifest.Manifest(manifest.OF_BUCKETS, digests))
        self._objects.write(f"{step}/{manifest.NAME}", text.encode())
        self._objects.delete([f"{step}{SAVING}"])

    def remove(self, step: int) -> None:
        self._objects.write(f"{step}{DELETED}", b"")
        self._remove(step, DELETED)

    def read_meta(self, step: int) -> dict[str, Any]:
        name = "/".join((str(step), *folders.META))
        where = f"{self.folder}/{step}"
        return folders.checked_meta(where, lambda: self._objects.read(name), f"{self.folder}/{name}")

    def check_number(self, step: int, meta: Mapping[str, Any]) -> None:
        true = folders.number_in(meta)
        if true is not None and true != step:
            raise CheckpointError(
                f"{self.folder}/{step} holds step {true}, so it was renamed. Move it back, or elsewhere if that "
                f"step is there too: gcloud storage mv {self.folder}/{step} {self.folder}/{true}"
            )

    def verify(self, step: int, summing: manifest.Summing | None = None) -> None:
        name = f"{step}/{manifest.NAME}"
        expected = manifest.parse(self._objects.read(name), f"{self.folder}/{name}")
        present = dict(self._objects.digests(f"{step}/", expected.algorithm))
        present.pop(manifest.NAME, None)
        manifest.compare(f"{self.folder}/{step}", expected.files, present)

    def why(self, error: Exception) -> str:
        return str(error) if isinstance(error, CheckpointError) else refusal(error, self._objects.bucket)

    def _steps(self) -> dict[int, set[str]]:
        """Step -> names of its objects, without the step's own prefix."""
        steps: dict[int, set[str]] = {}
        for name in self._objects.names():
            step, slash, rest = name.partition("/")
            if slash and step.isdecimal() and step.isascii():
                steps.setdefault(int(step), set()).add(rest)
        return steps

    def _leftovers(self) -> dict[int, str]:
        """Step -> the ending of the object that says what was begun with it."""
        marks = (re.fullmatch(r"(\d+)(\.saving|\.deleted)", name, re.ASCII) for name in self._objects.names())
        # If both are there, the step was whole before it was to be deleted.
        return {int(match[1]): match[2] for match in sorted(filter(None, marks), key=lambda m: m[2] == DELETED)}

    def _remove(self, step: int, mark: str) -> None:
        names = [f"{step}/{name}" for name in self._steps().get(step, ())]
        last = f"{step}/{manifest.NAME}"
        if last in names:  # first: from then on the step is not whole
            self._objects.delete([last])
        self._objects.delete([name for name in names if name != last])
        self._objects.delete([f"{step}{SAVING}"] if mark == SAVING else [f"{step}{SAVING}", f"{step}{DELETED}"])


def _unexplained(folder: str, step: int) -> str:
    return (
        f"{folder}/{step} has no {manifest.NAME}, which jaxft writes last, and no object {step}{SAVING}, which tells "
        f"of an interrupted save. If it was copied without this file, copy {manifest.NAME} from the original to "
        f"{folder}/{step}/{manifest.NAME}. If you do not need it, delete it: gcloud storage rm --recursive "
        f"{folder}/{step}"
    )
