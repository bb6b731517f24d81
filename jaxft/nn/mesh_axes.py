"""Names of mesh axes that layers know, and the mesh that they are traced under."""

# B batch

import math

import jax
from jax.sharding import AbstractMesh

BATCH_AXES = ("data", "fsdp", "expert")  # each of their devices computes other rows of a batch
FSDP, EXPERT = "fsdp", "expert"  # along which the weights of experts are split


def rows_mesh(batch: int) -> AbstractMesh | None:
    """The mesh in sight whose devices each hold equally many of `batch` rows.

    None on a single device, where no mesh is in sight (see `MeshPlan.within`), and where the rows do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    count = math.prod(mesh.shape[axis] for axis in rows_axes(mesh))
    return mesh if count > 1 and batch % count == 0 else None


def rows_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """The axes of a mesh over which the rows of a batch are split."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
