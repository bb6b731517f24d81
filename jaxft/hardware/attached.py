"""The accelerators of this process by the names that plans use, such as `v5e:2x4` and `t4:2`."""

import functools
import logging
import os
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxft.errors import ConfigError
from jaxft.hardware.chips import CHIPS, Chip
from jaxft.hardware.topology import Topology, cubic_shape
from jaxft.quant.narrow import MatmulDtype

log = logging.getLogger(__name__)

# What JAX calls a device, as a pattern, and the chip that it is, the narrower ones first. The names are those of libtpu
# and of NVIDIA's driver.
KINDS = (
    (r"TPU v5 ?(lite|e)", "v5e"), (r"TPU v6 ?(lite|e)", "v6e"), (r"TPU v5p?$", "v5p"), (r"TPU v4$", "v4"),
    (r"TPU ?v?7x?$", "tpu7x"), (r"\bT4$", "t4"), (r"\bL4$", "l4"), (r"\bL40S$", "l40s"),
    (r"\bA100\b.*\b40GB", "a100-40"), (r"\bA100\b", "a100-80"), (r"\bH100\b", "h100"), (r"\bH200\b", "h200"),
    (r"\bB200\b", "b200"), (r"\bRTX 4090$", "rtx4090"), (r"\bRTX 5090$", "rtx5090"),
)  # fmt: skip
VECTOR_MEMORY = "xla_tpu_scoped_vmem_limit_kib"  # libtpu's option: vector memory for the arrays of one fusion
UNKNOWN_OPTION = "No such compile option"


def attached_topology(devices: Sequence[jax.Device] | None = None) -> str | None:
    """The topology that these devices are, to be planned for by `jaxft.plan`; None if they are CPUs.

    devices: those of this process and its peers if None. Their torus is taken to be the most cubic one of their number.
    Raises ConfigError for a kind of device, or a number of them, that plans do not know.
    """
    devices = jax.devices() if devices is None else devices
    if devices[0].platform == "cpu":
        return None
    kind, chip = devices[0].device_kind, chip_of(devices[0])
    if chip is None:
        raise ConfigError(
            f"plans do not know the {kind} of this machine. Plan for one with as much memory or less, by its name: "
            f"{', '.join(CHIPS)}."
        )
    chips = len(devices) // chip.devices
    shape = cubic_shape(chip, chips)
    if shape is None:
        raise ConfigError(
            f"plans do not know a slice of {chips} chips of {chip.name}. Plan for a smaller one, such as "
            f"{chip.name}:{'x'.join('1' * chip.dimensions)}."
        )
    return Topology(chip=chip, shape=shape).name


def chip_of(device: jax.Device) -> Chip | None:
    """The chip that a device is or is a part of; None for one that plans do not know, such as a CPU."""
    return next((CHIPS[name] for pattern, name in KINDS if re.search(pattern, device.device_kind)), None)


def step_options(device: jax.Device) -> dict[str, int]:
    """The options of the compiler with which runs and plans compile a training step for a device.

    Empty for most devices, and for quick plans (`hardware.compile.compile_step`). v5e and v5p have `Chip.fusion_kib`,
    unless libtpu does not know the option, which the log then says. If the environment variable LIBTPU_INIT_ARGS sets
    it, that value counts.
    """
    chip = chip_of(device)
    if chip is None or chip.fusion_kib is None or VECTOR_MEMORY in os.environ.get("LIBTPU_INIT_ARGS", ""):
        return {}
    # A process of several can compile for its own devices alone; those of a plan are nobody's.
    here = jax.local_devices()[0] if device in jax.devices() else device
    return {VECTOR_MEMORY: chip.fusion_kib} if _knows_option(here, VECTOR_MEMORY, chip.fusion_kib) else {}


@functools.cache
def _knows_option(device: jax.Device, name: str, value: int) -> bool:
    """Whether the compiler for a device takes an option. It refuses every program with one that it does not know."""
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(jnp.negative, compiler_options={name: value}).lower(number).compile()
    except jax.errors.JaxRuntimeError as error:
        if UNKNOWN_OPTION not in str(error):
            raise
        log.warning(
            "this libtpu does not know the option %s: training steps are compiled without it, and may be a fifth "
            "slower. docs/performance.md names releases that know it",
            name,
        )
        return False
    return True


def check_matmul(dtype: MatmulDtype | None, device: jax.Device) -> None:
    """Raises ConfigError unless a device multiplies operands of this type faster than bfloat16, or is a CPU, which
    computes the same slowly.
    """
    if dtype is None or device.platform == "cpu":
        return
    chip = chip_of(device)
    if chip is None:
        raise ConfigError(
            f"train.matmul_dtype={dtype!r}, but of {device.device_kind} it is not known whether it multiplies {dtype} "
            f"faster than bfloat16, as some of {', '.join(CHIPS)} do: set it to None"
        )
    chip.check_matmul(dtype)


def memory_limit(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that a program may use on each of this process's devices; None if they do not tell, as CPUs do not."""
    stats = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    limits = [one.get("bytes_limit") for one in stats if one]
    return min(limits) if limits and all(limits) else None
