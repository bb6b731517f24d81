"""The folder of a run, as all of its processes see it.

It is a shared one; or one in a bucket, of which process 0 has a working copy, and the others the files that they fetch.
"""

import os
from pathlib import Path

from jaxft.files.buckets.working_copy import address_of, empty_folder_of, fetch, folder_of, push, stage
from jaxft.files.run_folder import CONFIG
from jaxft.sharding.processes import is_primary, on_primary

# Each of these is called on every process, in the same order. A BucketError of process 0 is a PeerError in the others.


def open_shared(output_dir: str | os.PathLike[str]) -> Path:
    """The folder of a run that process 0 has opened, with its config. Raises BucketError."""
    on_primary(lambda: push(folder_of(output_dir)))
    if is_primary():
        return folder_of(output_dir)
    folder = empty_folder_of(output_dir)
    fetch(folder / CONFIG)
    return folder


def share(path: Path) -> None:
    """Every process sees at `path` the file or folder that process 0 has written there. Raises BucketError."""
    on_primary(lambda: stage(path))
    if not is_primary():
        fetch(path)


def uploaded(path: Path) -> str:
    """Where this process reads a model that process 0 has written to `path`, finished or not. Raises BucketError.

    The other processes read it in the bucket, if the run is in one: each the parts that it needs.
    """
    on_primary(lambda: stage(path))
    return str(path) if is_primary() else address_of(path) or str(path)
