"""NVIDIA GPUs that are not here: devices for which JAX's CUDA plugin compiles programs without a driver."""

import importlib.util
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxft.errors import ConfigError
from jaxft.hardware.hlo import Module
from jaxft.hardware.products import target_of
from jaxft.hardware.topology import Topology

if TYPE_CHECKING:
    import jax

PLUGIN = "pip install 'jaxft[plan-gpu]'"
# Kernels are chosen by rules: measuring which is fastest needs the GPU.
OPTIONS = {"xla_gpu_autotune_level": 0}
# The level of a run. O1 is no quick way here: it adds passes, one of which copies layers and ends the compiler by a
# failed check ("Call graph must have been flattened") if a layer that gathers weights has a loop, as experts have.
LEVEL = "default"
CUDNN = (9, 10)
BACKWARD_ATTENTION = "__cudnn$fmhaScaleBiasSoftmaxBackward"
NO_COMPILER = "JAXFT_NO_GPU_COMPILER"  # an environment variable, with which GPUs are planned by arithmetic


@dataclass(frozen=True, kw_only=True)
class _Card:
    """What the compiler reads of a GPU. Source: the device descriptions in XLA's repository.

    cores: streaming multiprocessors. capability: of CUDA. units: for float32, of a core. shared: bytes of a core's
    shared memory, and those that one block may have. l2, memory: bytes. bandwidth: bytes a second. clock: GHz.
    """

    name: str
    cores: int
    capability: tuple[int, int]
    units: int
    shared: tuple[int, int]
    l2: int
    memory: int
    bandwidth: int
    clock: float


_H100 = _Card(
    name="NVIDIA H100 80GB HBM3", cores=132, capability=(9, 0), units=128, shared=(233472, 232448), l2=52428800,
    memory=84942979072, bandwidth=3352320000000, clock=1.98,
)  # fmt: skip
_A100 = _Card(
    name="NVIDIA A100-SXM4-80GB", cores=108, capability=(8, 0), units=64, shared=(167936, 166912), l2=41943040,
    memory=85100068864, bandwidth=2039040000000, clock=1.41,
)  # fmt: skip
CARDS = {
    "a100-40": replace(_A100, name="NVIDIA A100-SXM4-40GB", memory=42331013120, bandwidth=1555200000000),
    "a100-80": _A100,
    "h100": _H100,
    "h200": replace(_H100, name="NVIDIA H200 141GB HBM3e", memory=151397597184, bandwidth=4800000000000),
}


def can_compile(topology: Topology) -> bool:
    """Whether programs for these GPUs can be compiled here: they are known and in one host, and the plugin is there."""
    return topology.chip.name in CARDS and topology.count == 1 and has_plugin()


def has_plugin() -> bool:
    """Whether JAX's CUDA plugin is installed, and may be used."""
    return NO_COMPILER not in os.environ and all(
        importlib.util.find_spec(name) is not None for name in ("jax_plugins", "jax_cuda12_plugin")
    )


def devices(topology: Topology) -> "list[jax.Device]":
    """The GPUs of a topology, which programs can be compiled for but not run on.

    Raises ConfigError if the plugin refuses them. Changes what JAX believes about cuDNN in this process: it asks the
    machine that it lowers on, which has none.
    """
    import jax
    from jax._src.cudnn import fused_attention_stablehlo as attention
    from jax.experimental import topologies

    jax.devices()  # loads the plugins
    config = _target_config(CARDS[topology.chip.name])
    try:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=config, topology=f"1x1x{topology.chips}"
        )
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"topology {topology.name}: JAX's CUDA plugin does not describe it: {error}. Install the plugin of this "
            f"jax, {PLUGIN}, or uninstall it: then the plan is by arithmetic."
        ) from error
    attention.check_cudnn_version = lambda: CUDNN[0] * 10000 + CUDNN[1] * 100
    return list(description.devices)


def attention_workspace(queries: int, keys: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Bytes in which cuDNN's backward attention works on an A100; Hopper takes the gradient of queries once.

    Numbers of 4 bytes: the gradient of queries, twice, and a sum for each query and head. Of 2 bytes, if heads share
    keys: the gradients of keys and values for every head. queries, keys: tokens of all rows. Source: cuDNN 9.28 itself,
    which `benchmarks/cudnn_workspace.py` asks.
    """
    numbers = queries * heads * (2 * head_dim + 1)
    if kv_heads < heads:
        numbers += keys * heads * head_dim
    return 4 * numbers


def kernel_workspace(module: Module) -> int:
    """Bytes in which cuDNN's kernels work in turn. 0 if the compiler could ask cuDNN: then XLA counts them."""
    most = 0
    for computation in module.computations.values():
        for call in computation.instructions.values():
            is_attention = call.opcode == "custom-call" and target_of(call) == BACKWARD_ATTENTION
            if is_attention and not call.arrays[-1].elements:
                (rows, heads, queries, head_dim), (_, kv_heads, keys, _) = (array.dims for array in call.arrays[:2])
                most = max(most, attention_workspace(rows * queries, rows * keys, heads, kv_heads, head_dim))
    return most


def _target_config(card: _Card) -> str:
    """The description of a GPU as a text proto, GpuTargetConfigProto of XLA."""
    (major, minor), (shared, most_shared) = card.capability, card.shared
    numbers = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
        "shared_memory_per_block": 49152, "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": most_shared, "core_count": card.cores,
        "fpus_per_core": card.units, "l2_cache_size": card.l2,
        "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
        "memory_bandwidth": card.bandwidth, "device_memory_size": card.memory, "clock_rate_ghz": card.clock,
    }  # fmt: skip
    fields = " ".join(f"{name}: {number}" for name, number in numbers.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }}\n"
        f'platform_name: "CUDA"\ndnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}\n'
        f'device_description_str: "{card.name}"\n'
    )
