"""The names by which Google Cloud knows each kind of TPU: in its two APIs and in GKE, and the hosts of a slice.

Sources: the pages on TPU versions of Cloud TPU's, Compute Engine's and GKE's documentation, as they were in 2026.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from jaxft.errors import ConfigError
from jaxft.hardware.topology import Topology, parse

IMAGE_PROJECT = "ubuntu-os-accelerator-images"
# Slices of the kinds whose torus is flat, and the chips on one host of each.
FLAT: Mapping[tuple[int, ...], int] = MappingProxyType(
    {(1, 1): 1, (2, 2): 4, (2, 4): 8, (4, 4): 4, (4, 8): 4, (8, 8): 4, (8, 16): 4, (16, 16): 4}
)
CHIPS_OF_A_HOST = 4  # of the kinds with three dimensions


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Names of one kind of TPU. None where an API does not have it.

    accelerator: what stands before the number in accelerator types of the Cloud TPU API. counts_cores: whether that
    number counts cores, and not chips. runtime: the runtime version there. machine_types: of Compute Engine, by the
    number of chips of a host. image_family: its image. disk_type: of its boot disk, None for the default. gke: the
    value of the label cloud.google.com/gke-tpu-accelerator.
    """

    accelerator: str | None = None
    counts_cores: bool = False
    runtime: str | None = None
    machine_types: Mapping[int, str] = field(default_factory=dict)
    image_family: str | None = None
    disk_type: str | None = None
    gke: str

    @property
    def apis(self) -> tuple[str, ...]:
        """The APIs that have this kind, the one to prefer first."""
        return (*(["compute"] if self.machine_types else []), *(["tpu"] if self.accelerator else []))


_FAMILY_2204 = "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"
MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "v4": Machine(accelerator="v4", counts_cores=True, runtime="tpu-ubuntu2204-base", gke="tpu-v4-podslice"),
        "v5e": Machine(accelerator="v5litepod", runtime="v2-alpha-tpuv5-lite", gke="tpu-v5-lite-podslice"),
        "v5p": Machine(
            accelerator="v5p", counts_cores=True, runtime="v2-alpha-tpuv5", gke="tpu-v5p-slice",
            machine_types={4: "ct5p-hightpu-4t"}, image_family=_FAMILY_2204,
        ),
        "v6e": Machine(
            accelerator="v6e", runtime="v2-alpha-tpuv6e", gke="tpu-v6e-slice", image_family=_FAMILY_2204,
            machine_types={1: "ct6e-standard-1t", 4: "ct6e-standard-4t", 8: "ct6e-standard-8t"},
        ),
        "tpu7x": Machine(
            machine_types={4: "tpu7x-standard-4t"}, image_family="ubuntu-accel-2404-amd64-tpu-tpu7x",
            disk_type="hyperdisk-balanced", gke="tpu7x",
        ),
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SlicesRequest:
    """What every request for machines names. topology: of one slice, such as `v6e:4x4`. slices: their number."""

    topology: str
    slices: int = 1

    @property
    def shape(self) -> Topology:
        """The topology with its slices. Raises ConfigError if it does not exist."""
        return parse(self.topology, self.slices)

    @property
    def hosts(self) -> int:
        """The number of hosts of one slice."""
        return hosts_of_slice(self.shape)

    @property
    def processes(self) -> int:
        """The number of processes of the run: one on each host of every slice."""
        return self.hosts * self.slices


def machine_of(topology: Topology) -> Machine:
    """The names of a topology's chip. Raises ConfigError for a GPU."""
    if topology.chip.name not in MACHINES:
        raise ConfigError(
            f"topology {topology.name}: jaxft pod creates TPUs, and {topology.chip.name} is none. "
            f"Kinds: {', '.join(MACHINES)}. On a machine with GPUs, run jaxft train there."
        )
    return MACHINES[topology.chip.name]


def chips_of_host(topology: Topology) -> int:
    """The number of chips of each host. Raises ConfigError for a shape that Google Cloud does not offer."""
    machine_of(topology)
    if topology.chip.dimensions == 2:
        if topology.shape not in FLAT:
            shapes = ", ".join("x".join(map(str, shape)) for shape in FLAT)
            raise ConfigError(
                f"topology {topology.name}: Google Cloud has no such slice of {topology.chip.name}. Shapes: {shapes}."
            )
        return FLAT[topology.shape]
    if topology.shape[0] % 2 or topology.shape[1] % 2:
        raise ConfigError(
            f"topology {topology.name}: a host of {topology.chip.name} has 2x2x1 chips, so the first two sides are "
            f"even. The smallest slice is {topology.chip.name}:2x2x1."
        )
    return CHIPS_OF_A_HOST


def hosts_of_slice(topology: Topology) -> int:
    """The number of hosts of one slice."""
    return math.prod(topology.shape) // chips_of_host(topology)


def accelerator_type(topology: Topology) -> str:
    """The accelerator type of one slice in the Cloud TPU API, such as v5litepod-16 or v5p-8."""
    machine = machine_of(topology)
    chips = math.prod(topology.shape)
    return f"{machine.accelerator}-{chips * (topology.chip.cores if machine.counts_cores else 1)}"
