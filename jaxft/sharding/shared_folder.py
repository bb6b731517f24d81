"""The folder of a run, as all of its processes see it: a shared one, or each its own copy of one in a bucket."""

from pathlib import Path

from jaxft.files.buckets.working_copy import pull, push
from jaxft.sharding.processes import is_primary, on_primary


def share(folder: Path) -> None:
    """Every process sees what process 0 has written in a working copy of a bucket. Other folders are left as they are.

    Call it on every process, in the same order. Raises BucketError, in the others a PeerError.
    """
    on_primary(lambda: push(folder))
    if not is_primary():
        pull(folder)
