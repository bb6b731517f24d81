"""The accelerators that JAX sees, by the names that plans use."""

from types import SimpleNamespace

import jax
import pytest

from jaxft.errors import ConfigError
from jaxft.hardware.attached import KINDS, attached_topology, check_matmul
from jaxft.hardware.chips import CHIPS
from jaxft.hardware.topology import parse


def devices(kind: str, count: int):
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    return [SimpleNamespace(platform=platform, device_kind=kind) for _ in range(count)]


@pytest.mark.parametrize(
    ("kind", "count", "name"),
    [
        ("TPU v5 lite", 1, "v5e:1x1"),
        ("TPU v5 lite", 8, "v5e:2x4"),
        ("TPU v5e", 4, "v5e:2x2"),
        ("TPU v6 lite", 1, "v6e:1x1"),
        ("TPU v5", 4, "v5p:2x2x1"),
        ("TPU v5p", 8, "v5p:2x2x2"),
        ("TPU v4", 4, "v4:2x2x1"),
        # Two JAX devices a chip.
        ("TPU7x", 8, "tpu7x:2x2x1"),
        ("Tesla T4", 2, "t4:2"),
        ("NVIDIA L4", 1, "l4:1"),
        ("NVIDIA L40S", 1, "l40s:1"),
        ("NVIDIA A100-SXM4-40GB", 1, "a100-40:1"),
        ("NVIDIA A100-SXM4-80GB", 8, "a100-80:8"),
        ("NVIDIA A100 80GB PCIe", 1, "a100-80:1"),
        ("NVIDIA H100 80GB HBM3", 1, "h100:1"),
        ("NVIDIA H200", 1, "h200:1"),
        ("NVIDIA B200", 1, "b200:1"),
        ("NVIDIA GeForce RTX 4090", 1, "rtx4090:1"),
        ("NVIDIA GeForce RTX 5090", 1, "rtx5090:1"),
    ],
)
def test_devices_are_a_topology_that_can_be_planned_for(kind, count, name):
    topology = attached_topology(devices(kind, count))
    assert topology == name
    assert parse(topology).devices == count


def test_every_chip_of_the_table_is_recognised():
    assert {name for _, name in KINDS} == set(CHIPS)


def test_cpus_are_no_accelerator():
    assert attached_topology(jax.devices("cpu")) is None


@pytest.mark.parametrize(
    ("kind", "count", "message"),
    [
        ("Tesla P100-PCIE-16GB", 1, "do not know the Tesla P100.*with as much memory or less.*t4"),
        ("NVIDIA RTX A2000", 1, "do not know the NVIDIA RTX A2000"),
        ("TPU v5 lite", 3, "do not know a slice of 3 chips of v5e.*such as v5e:1x1"),
    ],
)
def test_what_plans_do_not_know_is_refused(kind, count, message):
    with pytest.raises(ConfigError, match=message):
        attached_topology(devices(kind, count))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("int8", "TPU v5 lite"), ("int8", "TPU v6 lite"), ("fp8", "TPU7x"), ("fp8", "NVIDIA H100 80GB HBM3"), (None, "x")],
)
def test_products_of_8_bits_are_for_chips_that_have_them(dtype, kind):
    check_matmul(dtype, devices(kind, 1)[0])
    check_matmul(dtype, jax.devices("cpu")[0])


@pytest.mark.parametrize(
    ("dtype", "kind", "message"),
    [
        (
            "fp8",
            "TPU v5 lite",
            "v5e is not known to multiply it faster than bfloat16: set it to 'int8', in which",
        ),
        ("fp8", "NVIDIA A100-SXM4-80GB", "a100-80 is not known .* 'int8'"),
        ("int8", "TPU7x", "tpu7x is not known .* 'fp8'"),
        ("int8", "TPU v4", "v4 is not known .*: set it to None"),
        ("int8", "NVIDIA RTX A2000", "of NVIDIA RTX A2000 it is not known"),
    ],
)
def test_products_of_8_bits_are_refused_where_they_gain_nothing(dtype, kind, message):
    with pytest.raises(ConfigError, match=message):
        check_matmul(dtype, devices(kind, 1)[0])
