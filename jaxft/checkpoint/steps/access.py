"""Where the steps of a run are kept: in a folder of this machine, or in a bucket.

Both have the same layout, so that a run may be copied from one to the other: a folder `<step>/` with Orbax's `state/`
and `meta/` and with `manifest.json`. They differ in how a step becomes whole, since a bucket cannot rename a folder.
"""

import os
from typing import Any, Protocol

from jaxft.checkpoint.manifest import Summing
from jaxft.checkpoint.steps.bucket import BucketSteps, is_bucket
from jaxft.checkpoint.steps.local import LocalSteps


class Steps(Protocol):
    """The steps in one folder. Their errors are CheckpointErrors, or OSErrors of a disk.

    folder: a path, or an address, for messages. mend: what to look at if a step could not be saved.
    """

    @property
    def folder(self) -> Any: ...

    @property
    def mend(self) -> str: ...

    def whole(self) -> tuple[int, ...]:
        """The whole steps, ascending; none if there is no folder."""
        ...

    def without_manifest(self) -> tuple[int, ...]:
        """Steps that have no manifest, and that no interrupted save is known to have left; ascending."""
        ...

    def others(self) -> tuple[str, ...]:
        """What is there besides steps, by name."""
        ...

    def exists(self, step: int) -> bool:
        """Whether there is anything of a step."""
        ...

    def path(self, step: int) -> Any:
        """The folder of a step, as Orbax takes it."""
        ...

    def check_names(self) -> None:
        """Refuses steps from which a run cannot go on: links, and those whose folder was renamed."""
        ...

    def refuse_without_whole(self) -> None:
        """Refuses a folder with steps that have no manifest and none that is whole: a run would begin anew."""
        ...

    def prepare(self) -> None:
        """Checks the names, makes the folder and removes what interrupted saves have left. For process 0."""
        ...

    def check_access(self) -> None:
        """Refuses a folder that this process cannot write to. For every process."""
        ...

    def begin(self, step: int, number: int) -> Any:
        """The path to which Orbax writes a step. For every process, in the same order. number: of the save."""
        ...

    def flush(self, step: int, number: int) -> None:
        """Returns, in process 0, when what all processes have written is safe."""
        ...

    def publish(self, step: int, number: int, summing: Summing) -> None:
        """Makes a written step whole. For process 0. summing: reads its files, if that is needed."""
        ...

    def remove(self, step: int) -> None:
        """Deletes a step, which is not whole any more before its first file goes. For process 0."""
        ...

    def read_meta(self, step: int) -> dict[str, Any]:
        """What was saved with the arrays; see `folders.read_meta`."""
        ...

    def check_number(self, step: int, meta: dict[str, Any]) -> None:
        """Refuses a step whose folder was renamed to another number. meta: of the step."""
        ...

    def verify(self, step: int, summing: Summing | None = None) -> None:
        """Compares every file of a step with its manifest. summing: reads them, if that is needed."""
        ...

    def why(self, error: Exception) -> str:
        """Why a step was not saved, from the error of a library."""
        ...


def steps_in(folder: str | os.PathLike[str]) -> Steps:
    """The steps in a checkpoint folder. Raises CheckpointError for an address that is not in a bucket of Google's."""
    return BucketSteps(str(folder)) if is_bucket(folder) else LocalSteps(folder)
