"""Peak numbers of accelerators in one table, each with its source."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

from jaxft.errors import ConfigError

GIB, TERA, GIGA = 2**30, 10**12, 10**9


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Limits of one kind of chip. Steps are compiled for TPU kinds; GPU kinds are planned by the roofline alone.

    hbm_bytes: memory that a program may use, less than the nominal size. flops: of dense bfloat16 products, per second;
    int8_ops, fp8_flops: likewise, 0 if it has none or they are not known. hbm_bandwidth: bytes per second.
    link_bandwidth: bytes per second of one link in one direction. dimensions: of the torus. full_ring: a side of this
    many chips closes to a ring. dcn_bandwidth: bytes per second of the data-centre network, one chip's share of its
    host's. max_chips: of a slice. devices: JAX devices in one chip.
    cores: that Google's names of slices count in one chip. config: libtpu's name of the chip's mode, None for its
    default. fusion_kib: vector memory in KiB that the compiler may give to each of its fusions in a training step, None
    for its default.
    """

    name: str
    maker: Literal["tpu", "gpu"]
    hbm_bytes: int
    flops: float
    int8_ops: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    full_ring: int
    dcn_bandwidth: float
    max_chips: int
    devices: int = 1
    cores: int = 1
    config: str | None = None
    fusion_kib: int | None = None
    fp8_flops: float = 0.0

    def matmul_flops(self, dtype: Literal["int8", "fp8"]) -> float:
        """The peak of products whose operands are of this type."""
        return self.int8_ops if dtype == "int8" else self.fp8_flops

    def check_matmul(self, dtype: Literal["int8", "fp8"] | None) -> None:
        """Raises ConfigError unless it multiplies operands of this type faster than bfloat16."""
        if dtype is None or self.matmul_flops(dtype) > self.flops:
            return
        other: Literal["int8", "fp8"] = "fp8" if dtype == "int8" else "int8"
        faster = f"{other!r}, in which it is, or " if self.matmul_flops(other) > self.flops else ""
        raise ConfigError(
            f"train.matmul_dtype={dtype!r}, but {self.name} is not known to multiply it faster than bfloat16: set it "
            f"to {faster}None"
        )


_tpu = partial(Chip, maker="tpu")


def _gpu(
    name: str, memory: float, tflops: float, int8: float, fp8: float, bandwidth: float, nvlink: float, network: float
) -> Chip:
    # Driver, context and allocator take about 6 % of the memory. A switch connects every GPU with every other: one
    # dimension, which is always a ring.
    return Chip(
        name=name, maker="gpu", hbm_bytes=int(memory * GIB * 0.94), flops=tflops * TERA, int8_ops=int8 * TERA,
        hbm_bandwidth=bandwidth * GIGA, link_bandwidth=nvlink * GIGA / 2, dimensions=1, full_ring=1,
        dcn_bandwidth=network * GIGA, max_chips=8, fp8_flops=fp8 * TERA,
    )  # fmt: skip


# From Google Cloud's pages cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: bf16 and int8 peak, HBM bandwidth,
# interconnect per chip (given for both directions of all its links together), torus, pod size, DCN of a pod. Only v5e's
# page was read for this table, in November 2026; the other numbers are from memory, not checked against the pages.
# hbm_bytes: the limit that libtpu 0.0.42.1 names when it refuses a program that is too large.
# fusion_kib: for chips of which it is known how much longer a layer then compiles (docs/performance.md).
_TPUS = (
    # 275 TFLOPs, 1200 GBps, 3D torus, 300 GBps of links in one direction (6 of 50).
    _tpu(name="v4", hbm_bytes=int(30.75 * GIB), flops=275 * TERA, int8_ops=275 * TERA, hbm_bandwidth=1228 * GIGA,
         link_bandwidth=45 * GIGA, dimensions=3, full_ring=4, dcn_bandwidth=6.25 * GIGA, max_chips=4096, cores=2,
         config="megacore"),
    # 197 TFLOPs, 393 TOPs, 819 GBps, 2D torus of 4 links, 400 GBps both ways; 6.4 Tbps of DCN for 256 chips.
    _tpu(name="v5e", hbm_bytes=int(15.75 * GIB), flops=197 * TERA, int8_ops=393 * TERA, hbm_bandwidth=819 * GIGA,
         link_bandwidth=50 * GIGA, dimensions=2, full_ring=16, dcn_bandwidth=3.125 * GIGA, max_chips=256,
         fusion_kib=32768),
    # 459 TFLOPs, 918 TOPs, 2765 GBps, 3D torus of 6 links, 1200 GBps both ways.
    _tpu(name="v5p", hbm_bytes=int(95.74 * GIB), flops=459 * TERA, int8_ops=918 * TERA, hbm_bandwidth=2765 * GIGA,
         link_bandwidth=100 * GIGA, dimensions=3, full_ring=4, dcn_bandwidth=6.25 * GIGA, max_chips=8960, cores=2,
         fusion_kib=24576),
    # 918 TFLOPs, 1836 TOPs, 1638 GBps, 2D torus of 4 links, 800 GBps both ways; 25.6 Tbps of DCN for 256 chips.
    _tpu(name="v6e", hbm_bytes=int(31.25 * GIB), flops=918 * TERA, int8_ops=1836 * TERA, hbm_bandwidth=1638 * GIGA,
         link_bandwidth=100 * GIGA, dimensions=2, full_ring=16, dcn_bandwidth=12.5 * GIGA, max_chips=256),
    # 2307 TFLOPs bf16 (4614 fp8), 192 GiB, 7380 GBps, 3D torus of 6 links, 1200 GBps both ways; two devices a chip.
    _tpu(name="tpu7x", hbm_bytes=int(189.5 * GIB), flops=2307 * TERA, int8_ops=0, hbm_bandwidth=7380 * GIGA,
         link_bandwidth=100 * GIGA, dimensions=3, full_ring=4, dcn_bandwidth=12.5 * GIGA, max_chips=9216, devices=2,
         cores=2, fp8_flops=4614 * TERA),
)  # fmt: skip
# From memory of NVIDIA's data sheets, not checked against them: memory in GB, dense bf16 TFLOPs with float32 sums, int8
# TOPs, dense fp8 TFLOPs with float32 sums, memory GB/s, NVLink GB/s both ways (PCIe for products without NVLink),
# network GB/s per GPU in usual machines of 8 GPUs.
_GPUS = (
    # 15 of its 16 GB are left with error correction. It has no bfloat16 units, so these products run in float32.
    _gpu("t4", 15, 8.1, 130, 0, 320, 32, 1.25),
    _gpu("a100-40", 40, 312, 624, 0, 1555, 600, 12.5),
    _gpu("a100-80", 80, 312, 624, 0, 2039, 600, 25),
    _gpu("h100", 80, 989, 1979, 1979, 3350, 900, 50),
    _gpu("h200", 141, 989, 1979, 1979, 4800, 900, 50),
    _gpu("b200", 180, 2250, 4500, 4500, 8000, 1800, 50),
    _gpu("l4", 24, 121, 242, 242, 300, 64, 6.25),
    _gpu("l40s", 48, 362, 733, 733, 864, 64, 12.5),
    _gpu("rtx4090", 24, 165, 661, 330, 1008, 64, 1.25),
    _gpu("rtx5090", 32, 209, 838, 419, 1792, 128, 1.25),
)
CHIPS: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in (*_TPUS, *_GPUS)})
