"""The device mesh, how arrays are split over it, and runs of several processes."""

from jaxft.sharding.mesh import MeshPlan, make_mesh_plan

__all__ = ["MeshPlan", "make_mesh_plan"]
