"""The mesh section: how many devices each axis of the mesh has."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from jaxft.config.fields import Range, Section
from jaxft.errors import ConfigError

DEVICES = Range(lambda value: value > 0 or value == -1, "a positive number of devices, or -1 for the rest")


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Devices per mesh axis; -1 takes all that remain."""

    auto: Annotated[
        bool, "choose the axes by the number of devices, batch size and heads; the other fields are then ignored"
    ] = False
    slice: Annotated[
        int, DEVICES, "slices joined by the data-centre network, over which only gradients are exchanged"
    ] = 1
    data: Annotated[int, DEVICES, "data parallelism: different rows, full weights on each device"] = 1
    fsdp: Annotated[
        int, DEVICES, "fully sharded: different rows; parameters and moments are split, and gathered for use"
    ] = -1
    expert: Annotated[
        int,
        DEVICES,
        "expert parallelism: as `mesh.fsdp`, and each device has different experts; must divide their number",
    ] = 1
    context: Annotated[int, DEVICES, "context parallelism: different positions of the same rows"] = 1
    tensor: Annotated[int, DEVICES, "tensor parallelism: different heads and inner units, for the same rows"] = 1

    def check(self) -> None:
        rest = [f"mesh.{axis}" for axis, size in dataclasses.asdict(self).items() if axis != "auto" and size == -1]
        if len(rest) > 1:
            raise ConfigError(
                f"{' and '.join(rest)} are -1, but only one axis can take the devices that remain: set the others to a "
                "number"
            )
