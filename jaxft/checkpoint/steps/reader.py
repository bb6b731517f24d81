"""How Orbax reads a step: our manifest says that it is whole, and no mark of Orbax's own."""

from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.path import atomicity


def reader(handler: Any, **options: Any) -> ocp.Checkpointer:
    """A checkpointer that restores.

    In a bucket, Orbax would refuse a step without its `commit_success.txt`, which is not in a step that was copied
    there from a disk.
    """
    return ocp.Checkpointer(handler, temporary_path_class=atomicity.AtomicRenameTemporaryPath, **options)
