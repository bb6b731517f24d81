"""Where arrays live: one mesh for every number of devices, path rules, multi-host start-up."""

from jaxft.sharding.mesh import MeshPlan, make_mesh_plan
from jaxft.sharding.rules import RULES, Rule

__all__ = ["RULES", "MeshPlan", "Rule", "make_mesh_plan"]
