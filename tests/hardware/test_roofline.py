"""Seconds from counted work, by hand; sizes of published models."""

import dataclasses
import json

import numpy as np
import pytest

from jaxft import models
from jaxft.assets import ASSETS
from jaxft.hardware.compile import parse_too_large
from jaxft.hardware.costs import Costs, Transfer, Work
from jaxft.hardware.roofline import Efficiency, axis_bandwidths, step_time
from jaxft.hardware.sizes import sizes_of
from jaxft.hardware.topology import parse

WHOLE = Efficiency(products=1.0, memory=1.0, network=1.0, overlap=0.5)


def test_products_and_memory_overlap():
    topology = parse("v5e:1x1")
    costs = Costs()
    costs.work[Work(int(197e12), int(0.5 * 819e9))] += 2
    costs.work[Work(0, int(819e9))] += 2
    time = step_time(costs, topology, {}, WHOLE)
    assert time.products == pytest.approx(2) and time.memory == pytest.approx(3)
    assert time.busy == time.total == pytest.approx(3) and time.bound == "memory"


def test_products_wait_for_weights_that_are_dequantised():
    costs = Costs()
    costs.work[Work(int(197e12), 0, dequantized=int(1e10), tiled=int(1.6e11))] += 1
    time = step_time(costs, parse("v5e:1x1"), {}, WHOLE)
    assert time.dequantizing == pytest.approx(0.5 + 0.5) and time.busy == pytest.approx(2)
    assert step_time(costs, parse("h100:1"), {}, WHOLE).dequantizing == 0


@pytest.mark.parametrize(("topology", "dtype"), [("v5e:1x1", "int8"), ("h100:1", "fp8"), ("rtx4090:1", "fp8")])
def test_products_of_8_bits_have_a_peak_of_their_own(topology, dtype):
    topology, costs = parse(topology), Costs()
    costs.work[Work(int(3 * topology.chip.flops), 0, narrow=int(2 * topology.chip.flops))] += 1
    assert step_time(costs, topology, {}, WHOLE, matmul_dtype=dtype).products == pytest.approx(1 + 1, rel=0.01)
    assert step_time(costs, topology, {}, WHOLE).products == pytest.approx(3)


def test_products_wait_for_numbers_that_are_rounded():
    costs = Costs()
    costs.work[Work(int(197e12), 0, rounded=int(1e11))] += 1
    time = step_time(costs, parse("v5e:1x1"), {}, WHOLE)
    assert time.rounding == pytest.approx(2) and time.busy == time.total == pytest.approx(3)
    assert step_time(costs, parse("h100:1"), {}, WHOLE).rounding == 0


def test_two_devices_of_a_chip_share_its_peaks():
    costs = Costs()
    costs.work[Work(int(2307e12), 0)] += 1
    assert step_time(costs, parse("tpu7x:1x1x1"), {}, WHOLE).products == pytest.approx(2)


def test_half_of_the_network_hides_behind_computing():
    topology = parse("v5e:4x4")
    costs = Costs()
    costs.work[Work(int(197e12), 0)] += 10
    costs.transfers[Transfer("all-gather", ("fsdp",), int(100e9))] += 4
    time = step_time(costs, topology, {"fsdp": 100e9}, WHOLE)
    assert dict(time.network) == {"fsdp": pytest.approx(4)}
    assert time.exposed == pytest.approx(2) and time.total == pytest.approx(12) and time.bound == "compute"


def test_no_more_hides_than_there_is_computing():
    costs = Costs()
    costs.transfers[Transfer("all-reduce", ("slice", "fsdp"), int(3.125e9))] += 4
    time = step_time(costs, parse("v5e:4x4", 2), {"slice": 3.125e9, "fsdp": 100e9}, WHOLE)
    assert time.exposed == pytest.approx(4) and time.bound == "network"  # at the pace of the slowest


def test_an_axis_uses_the_links_of_the_sides_along_which_it_lies():
    axes = {"slice": 1, "fsdp": 4, "tensor": 4}
    grid = np.indices((4, 4)).reshape(2, -1).T.reshape(1, 4, 4, 2)
    # Sides of 4 are lines on v5e, which closes rings of 16; on v5p a side of 4 is a ring.
    assert axis_bandwidths(parse("v5e:4x4"), axes, grid)["tensor"] == 50e9
    both = np.indices((4, 4)).reshape(2, -1).T.reshape(1, 16, 1, 2)
    assert axis_bandwidths(parse("v5e:4x4"), {"slice": 1, "fsdp": 16, "tensor": 1}, both)["fsdp"] == 100e9
    rings = np.indices((16, 16)).reshape(2, -1).T.reshape(1, 256, 1, 2)
    assert axis_bandwidths(parse("v5e:16x16"), {"slice": 1, "fsdp": 256, "tensor": 1}, rings)["fsdp"] == 200e9
    cube = np.indices((4, 4, 4)).reshape(3, -1).T.reshape(1, 64, 1, 3)
    assert axis_bandwidths(parse("v5p:4x4x4"), {"slice": 1, "fsdp": 64, "tensor": 1}, cube)["fsdp"] == 600e9


def abstract(name):
    hf = json.loads((ASSETS / "published" / f"{name}.json").read_text(encoding="utf-8"))
    return models.abstract_model(models.config_from_hf(hf))


def test_model_flops_of_a_dense_model_by_hand():
    sizes = sizes_of(abstract("llama-3.1-8b"))
    assert sizes.parameters == 8_030_261_248 and sizes.adapter == 0 and sizes.layers == 32
    active = 8_030_261_248 - 128256 * 4096 - 65 * 4096  # no table of embeddings, no norms
    assert sizes.active == active
    scores = 32 * 12 * 32 * 128 * (4096 * 4097 // 2)
    assert sizes.model_flops(2, 4096) == 6 * active * 2 * 4096 + 2 * scores
    frozen = dataclasses.replace(sizes, trained=0)
    assert frozen.model_flops(2, 4096) == 4 * active * 2 * 4096 + 2 * scores


def test_only_chosen_experts_and_seen_windows_count():
    mixtral = sizes_of(abstract("mixtral-8x7b"))
    assert mixtral.parameters == 46_702_792_704
    assert mixtral.active == pytest.approx(12.9e9 - 32000 * 4096, rel=0.01)  # the authors say 13B active
    gemma = sizes_of(abstract("gemma-3-1b"))
    assert sum(group.layers for group in gemma.attention if group.window == 512) == 22
    table = 262144 * 1152  # tied: the head multiplies, the table does not
    assert gemma.active == pytest.approx(gemma.parameters, rel=0.001) and gemma.active > table


def test_the_compilers_message_for_too_large_a_step_is_read():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 26.68G of 15.75G hbm. Exceeded by 10.9G."
    parsed = parse_too_large(message)
    assert parsed.used == int(26.68 * 2**30) and parsed.limit == int(15.75 * 2**30) and parsed.temporaries is None
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (62.98G) exceeds "
        "available HBM (15.75G)."
    )
    parsed = parse_too_large(message)
    assert (parsed.used, parsed.temporaries, parsed.limit) == (None, int(62.98 * 2**30), int(15.75 * 2**30))
    assert parse_too_large("RESOURCE_EXHAUSTED: something else").used is None
    assert parse_too_large("INTERNAL: a bug") is None
    # A kernel's vector memory is another matter than the chip's main memory.
    assert parse_too_large("RESOURCE_EXHAUSTED: E1001: Ran out of memory in memory space vmem while allocating") is None
