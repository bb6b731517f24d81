"""From counted work to seconds: what a chip reaches of its peaks, and how much communication hides behind computing."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxft.hardware.chips import Chip
from jaxft.hardware.costs import Costs
from jaxft.hardware.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the peaks that long-running training reaches.

    products: of matrix products' peak. memory: of main memory's bandwidth. network: of links' bandwidth. overlap: share
    of communication that can run while the chip computes.
    """

    products: float
    memory: float = 0.8
    network: float = 0.8
    overlap: float = 0.8


# Products: v5e, v5p and v6e from half of the throughputs that MaxText publishes (benchmarks/plan_vs_published.py; the
# other half, and how far off it is, in docs/plan.md). The others are guesses: the generation before or after, and what
# GPUs usually reach.
PRODUCTS = {"v4": 0.7, "v5e": 0.79, "v5p": 0.75, "v6e": 0.5, "tpu7x": 0.5}
GPU_PRODUCTS = 0.6


def efficiency_of(chip: Chip) -> Efficiency:
    """What is assumed of a kind of chip."""
    return Efficiency(products=PRODUCTS.get(chip.name, GPU_PRODUCTS))


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step on one chip.

    products, memory: what either would take alone; they overlap. network: communication alone, by mesh axes. exposed:
    the part of it that computing does not hide.
    """

    products: float
    memory: float
    network: Mapping[str, float]
    exposed: float

    @property
    def busy(self) -> float:
        """Seconds of computing."""
        return max(self.products, self.memory)

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.busy + self.exposed

    @property
    def bound(self) -> str:
        """What the step waits for most: compute, memory or network."""
        if self.exposed > self.busy:
            return "network"
        return "compute" if self.products >= self.memory else "memory"


def step_time(
    costs: Costs, topology: Topology, bandwidths: Mapping[str, float], efficiency: Efficiency | None = None
) -> StepTime:
    """Time of counted work. bandwidths: bytes a second that a device receives along a mesh axis, at best."""
    chip = topology.chip
    efficiency = efficiency or efficiency_of(chip)
    products = costs.flops / (chip.flops / chip.devices * efficiency.products)
    memory = costs.hbm_bytes / (chip.hbm_bandwidth / chip.devices * efficiency.memory)
    network: dict[str, float] = {}
    for transfer, times in costs.transfers.items():
        # Members that differ in several axes use the links of the best, but wait for the network between slices.
        found = [bandwidths[axis] for axis in transfer.axes]
        speed = min(found) if "slice" in transfer.axes else max(found)
        name = "+".join(transfer.axes)
        network[name] = network.get(name, 0.0) + times * transfer.bytes / (speed * efficiency.network)
    whole = sum(network.values())
    exposed = whole - min(efficiency.overlap * whole, max(products, memory))
    return StepTime(products=products, memory=memory, network=network, exposed=exposed)


def axis_bandwidths(topology: Topology, axes: Mapping[str, int], coordinates: np.ndarray | None) -> dict[str, float]:
    """Bytes a second that one device can receive along each mesh axis.

    coordinates: of every device in the torus, [*axes, dimensions]; None where there is no torus (GPUs). An axis that
    lies along several sides of the torus uses the links of all; along a side that closes to a ring, those of both
    directions. Sources: the chips' pages; how rings divide the work: the JAX scaling book, on TPUs and sharding.
    """
    chip, out = topology.chip, {}
    for at, name in enumerate(axes):
        if name == "slice":
            out[name] = chip.dcn_bandwidth
            continue
        if coordinates is None:
            out[name] = chip.link_bandwidth
            continue
        spread = np.moveaxis(coordinates, at, 0)
        sides = [d for d in range(spread.shape[-1]) if (spread[..., d] != spread[:1, ..., d]).any()]
        speed = 0.0
        for side in sides:
            length = len(np.unique(spread[..., side]))
            ring = length == topology.shape[side] and length % chip.full_ring == 0
            speed += chip.link_bandwidth * (2 if ring else 1)
        # Two devices of one chip talk faster than any link.
        out[name] = speed / chip.devices if speed else chip.link_bandwidth * 4
    return out
