"""Seconds of a step from its costs: the share of its peaks that a chip reaches, and how much communication overlaps
computation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxft.hardware.chips import Chip
from jaxft.hardware.costs import Costs
from jaxft.hardware.topology import Topology
from jaxft.quant.narrow import MatmulDtype


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of a chip's peaks that training reaches.

    products: of the peak of matrix products. memory: of the bandwidth of main memory. network: of the bandwidth of
    links. overlap: share of communication that can run during computation.
    """

    products: float
    memory: float = 0.8
    network: float = 0.8
    overlap: float = 0.8


# v5e to tpu7x and h100: fitted to some of the throughputs that others publish, by benchmarks/plan_vs_published.py;
# docs/plan.md has the error on the others. h200 has the cores of h100. The rest are guesses: from the next generation,
# and from what GPUs usually reach.
PRODUCTS = {"v4": 0.7, "v5e": 0.79, "v5p": 0.75, "v6e": 0.5, "tpu7x": 0.65, "h100": 0.39, "h200": 0.39}
GPU_PRODUCTS = 0.6
# NF4 weights that a chip makes dense in a second, for main memory and in tiles of a kernel; neither overlaps products.
# From the compiler: cycles of a product with such weights, or instructions of the kernel in blocks of 2,048 rows, above
# the cycles of the same product with bfloat16 (docs/quantization.md has them). For main memory v5p is not compiled: it
# has two cores like that of v5e, at its own clock.
DEQUANTIZED_PER_SECOND = {"v5e": (2.0e10, 3.2e11), "v5p": (4.7e10, 7.0e11), "v6e": (3.2e10, 2.1e11)}
# Numbers that a chip rounds to 8 bits in a second, their largest magnitudes included, which does not overlap products:
# from the cycles of these fusions in compiled products of 4,096 rows with 4,096 x 14,336 weights; v5p as for NF4. GPUs
# round as fast as their memory is, whose bytes are counted.
ROUNDED_PER_SECOND = {"v5e": 5.0e10, "v5p": 1.2e11}


def efficiency_of(chip: Chip) -> Efficiency:
    """The assumed efficiency of a kind of chip."""
    return Efficiency(products=PRODUCTS.get(chip.name, GPU_PRODUCTS))


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step on one chip.

    products, memory: of either alone; the two overlap. dequantizing: of making NF4 weights dense, for which products
    wait; rounding: of operands to 8 bits, likewise. network: of communication alone, by mesh axes. exposed: the part
    of communication that does not overlap computation.
    """

    products: float
    memory: float
    dequantizing: float
    network: Mapping[str, float]
    exposed: float
    rounding: float = 0.0

    @property
    def computing(self) -> float:
        """Seconds of products and of what they wait for."""
        return self.products + self.dequantizing + self.rounding

    @property
    def busy(self) -> float:
        """Seconds of computation."""
        return max(self.computing, self.memory)

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.busy + self.exposed

    @property
    def bound(self) -> str:
        """The resource that limits the step: compute, memory or network."""
        if self.exposed > self.busy:
            return "network"
        return "compute" if self.computing >= self.memory else "memory"


def step_time(
    costs: Costs,
    topology: Topology,
    bandwidths: Mapping[str, float],
    efficiency: Efficiency | None = None,
    matmul_dtype: MatmulDtype | None = None,
) -> StepTime:
    """Time of a step. bandwidths: peak bytes per second that a device receives along each mesh axis.

    efficiency: None for that of the chip. matmul_dtype: of the operands of its narrow products.
    """
    chip = topology.chip
    efficiency = efficiency or efficiency_of(chip)
    narrow_peak = chip.flops if matmul_dtype is None else chip.matmul_flops(matmul_dtype)
    flops = costs.flops - costs.narrow + costs.narrow * chip.flops / narrow_peak
    products = flops / (chip.flops / chip.devices * efficiency.products)
    memory = costs.hbm_bytes / (chip.hbm_bandwidth / chip.devices * efficiency.memory)
    dequantizing = dequantizing_seconds(costs, chip)
    rate = ROUNDED_PER_SECOND.get(chip.name)
    rounding = 0.0 if rate is None else costs.rounded / (rate / chip.devices)
    network: dict[str, float] = {}
    for transfer, times in costs.transfers.items():
        # A group along several axes uses the fastest links among them, but has to wait for the network between slices.
        speeds = [bandwidths[axis] for axis in transfer.axes]
        speed = min(speeds) if "slice" in transfer.axes else max(speeds)
        name = "+".join(transfer.axes)
        network[name] = network.get(name, 0.0) + times * transfer.bytes / (speed * efficiency.network)
    communication = sum(network.values())
    hidden = min(efficiency.overlap * communication, max(products + dequantizing + rounding, memory))
    return StepTime(
        products=products,
        memory=memory,
        dequantizing=dequantizing,
        network=network,
        exposed=communication - hidden,
        rounding=rounding,
    )


def dequantizing_seconds(costs: Costs, chip: Chip) -> float:
    """Seconds in which one device makes NF4 weights dense; 0 for chips of which it is not known."""
    rates = DEQUANTIZED_PER_SECOND.get(chip.name)
    if rates is None:
        return 0.0
    return sum(
        count / (rate / chip.devices) for count, rate in zip((costs.dequantized, costs.tiled), rates, strict=True)
    )


def axis_bandwidths(topology: Topology, axes: Mapping[str, int], coordinates: np.ndarray | None) -> dict[str, float]:
    """Peak bytes per second that one device receives along each mesh axis.

    coordinates: of every device in the torus, [*axes, dimensions]; None for GPUs, which form no torus. An axis that
    extends along several sides of the torus uses the links of all of them; along a side that closes to a ring, the
    links of both directions. Sources: the chips' pages; for how rings divide the work, the JAX scaling book on TPUs and
    sharding.
    """
    chip, out = topology.chip, {}
    for at, name in enumerate(axes):
        if name == "slice":
            out[name] = chip.dcn_bandwidth
            continue
        if coordinates is None:
            out[name] = chip.link_bandwidth
            continue
        by_axis = np.moveaxis(coordinates, at, 0)
        sides = [d for d in range(by_axis.shape[-1]) if (by_axis[..., d] != by_axis[:1, ..., d]).any()]
        speed = 0.0
        for side in sides:
            length = len(np.unique(by_axis[..., side]))
            ring = length == topology.shape[side] and length % chip.full_ring == 0
            speed += chip.link_bandwidth * (2 if ring else 1)
        # An axis within one chip: its two devices exchange data faster than any link carries.
        out[name] = speed / chip.devices if speed else chip.link_bandwidth * 4
    return out
