"""Where arrays live: one mesh for every number of devices, layouts, multi-host start-up."""

from jaxft.sharding.mesh import MeshPlan, make_mesh_plan

__all__ = ["MeshPlan", "make_mesh_plan"]
