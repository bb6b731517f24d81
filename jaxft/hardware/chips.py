"""Accelerators: what a chip can do at best. One table; each figure with its source."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

GIB, TERA, GIGA = 2**30, 10**12, 10**9


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip's limits. TPU kinds are compiled for; GPU kinds are planned by the roofline alone.

    hbm_bytes: what a program may use, not what is printed on the box. flops: dense bfloat16 products a second, int8_ops
    likewise. hbm_bandwidth, link_bandwidth: bytes a second, the latter of one link in one direction. dimensions: of the
    torus; full_ring: a side this long is closed to a ring. dcn_bandwidth: bytes a second of the data-centre network, a
    chip's share of its host. devices: of JAX in one chip. cores: that its marketing name counts in one chip.
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


def _tpu(name: str, **figures: float | int | str) -> Chip:
    return Chip(name=name, maker="tpu", **figures)


def _gpu(name: str, memory: float, tflops: float, int8: float, bandwidth: float, nvlink: float, network: float) -> Chip:
    # A driver, a context and the allocator's slack take some 6 %. Every GPU reaches every other through a switch: one
    # dimension, always a ring.
    return Chip(
        name=name, maker="gpu", hbm_bytes=int(memory * GIB * 0.94), flops=tflops * TERA, int8_ops=int8 * TERA,
        hbm_bandwidth=bandwidth * GIGA, link_bandwidth=nvlink * GIGA / 2, dimensions=1, full_ring=1,
        dcn_bandwidth=network * GIGA, max_chips=8,
    )  # fmt: skip


# What Google Cloud's pages cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} say: bf16 and int8 peak, HBM bandwidth,
# interconnect a chip (given for both directions of all its links together), torus, pod size, DCN of a pod. Only v5e's
# page was read for this table, in November 2026; the others' figures are from memory, not checked against theirs.
# hbm_bytes: what libtpu 0.0.42.1 names as available to a program that is too large.
_TPUS = (
    # 275 TFLOPs, 1200 GBps, 3D torus, 300 GBps of links in one direction (6 of 50).
    _tpu("v4", hbm_bytes=int(30.75 * GIB), flops=275 * TERA, int8_ops=275 * TERA, hbm_bandwidth=1228 * GIGA,
         link_bandwidth=45 * GIGA, dimensions=3, full_ring=4, dcn_bandwidth=6.25 * GIGA, max_chips=4096, cores=2,
         config="megacore"),
    # 197 TFLOPs, 393 TOPs, 819 GBps, 2D torus of 4 links, 400 GBps both ways; 6.4 Tbps of DCN for 256 chips.
    _tpu("v5e", hbm_bytes=int(15.75 * GIB), flops=197 * TERA, int8_ops=393 * TERA, hbm_bandwidth=819 * GIGA,
         link_bandwidth=50 * GIGA, dimensions=2, full_ring=16, dcn_bandwidth=3.125 * GIGA, max_chips=256),
    # 459 TFLOPs, 918 TOPs, 2765 GBps, 3D torus of 6 links, 1200 GBps both ways.
    _tpu("v5p", hbm_bytes=int(95.74 * GIB), flops=459 * TERA, int8_ops=918 * TERA, hbm_bandwidth=2765 * GIGA,
         link_bandwidth=100 * GIGA, dimensions=3, full_ring=4, dcn_bandwidth=6.25 * GIGA, max_chips=8960, cores=2),
    # 918 TFLOPs, 1836 TOPs, 1638 GBps, 2D torus of 4 links, 800 GBps both ways; 25.6 Tbps of DCN for 256 chips.
    _tpu("v6e", hbm_bytes=int(31.25 * GIB), flops=918 * TERA, int8_ops=1836 * TERA, hbm_bandwidth=1638 * GIGA,
         link_bandwidth=100 * GIGA, dimensions=2, full_ring=16, dcn_bandwidth=12.5 * GIGA, max_chips=256),
    # 2307 TFLOPs bf16 (4614 fp8), 192 GiB, 7380 GBps, 3D torus of 6 links, 1200 GBps both ways; two devices a chip.
    _tpu("tpu7x", hbm_bytes=int(189.5 * GIB), flops=2307 * TERA, int8_ops=4614 * TERA, hbm_bandwidth=7380 * GIGA,
         link_bandwidth=100 * GIGA, dimensions=3, full_ring=4, dcn_bandwidth=12.5 * GIGA, max_chips=9216, devices=2,
         cores=2),
)  # fmt: skip
# From memory of NVIDIA's data sheets of each product, not checked against them: memory in GB, dense bf16 TFLOPs with
# float32 sums, int8 TOPs, memory GB/s,
# NVLink GB/s both ways (PCIe where there is none), network GB/s a GPU of usual 8-GPU machines.
_GPUS = (
    _gpu("a100-40", 40, 312, 624, 1555, 600, 12.5),
    _gpu("a100-80", 80, 312, 624, 2039, 600, 25),
    _gpu("h100", 80, 989, 1979, 3350, 900, 50),
    _gpu("h200", 141, 989, 1979, 4800, 900, 50),
    _gpu("b200", 180, 2250, 4500, 8000, 1800, 50),
    _gpu("l4", 24, 121, 242, 300, 64, 6.25),
    _gpu("l40s", 48, 362, 733, 864, 64, 12.5),
    _gpu("rtx4090", 24, 165, 661, 1008, 64, 1.25),
    _gpu("rtx5090", 32, 209, 838, 1792, 128, 1.25),
)
CHIPS: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in (*_TPUS, *_GPUS)})
