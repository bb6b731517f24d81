"""Candidates of a search: every mesh axis that is useful, and overrides that a config accepts."""

import math
from pathlib import Path

import pytest

from jaxft import config
from jaxft.hardware.topology import parse
from jaxft.planning import search as plan_search
from jaxft.planning.job import abstract_step_of, estimate_step, sharded_step_of
from jaxft.planning.shapes import length_of, shapes_of

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA, MIXTRAL = (str(CONFIGS / f"{name}_lora.py") for name in ("llama3_1_8b", "mixtral_8x7b"))
LONG = {"data.max_length": 32768, "train.batch_size": 2}


def tried(path, overrides, topology, experts):
    """The meshes of all candidates."""
    run = config.load(path, overrides)
    return [variant.mesh for variant, _ in plan_search.variants(run, [parse(topology)], experts)]


def test_the_context_axis_is_for_long_rows_alone():
    assert {mesh.context for mesh in tried(LLAMA, {}, "v5e:4x4", None)} == {1}
    assert {mesh.context for mesh in tried(LLAMA, LONG, "v5e:4x4", None)} == {1, 2, 4, 8}
    # Parts that are not whole blocks of the kernel are not tried.
    odd = LONG | {"data.max_length": 16384 + 256}
    assert {mesh.context for mesh in tried(LLAMA, odd, "v5e:4x4", None)} == {1, 2}


def test_the_expert_axis_is_for_models_with_experts_and_divides_them():
    assert {mesh.expert for mesh in tried(MIXTRAL, {}, "v5e:4x4", None)} == {1}
    assert {mesh.expert for mesh in tried(MIXTRAL, {}, "v5e:4x4", 8)} == {1, 2, 4, 8}
    assert {mesh.expert for mesh in tried(MIXTRAL, {}, "v5e:4x4", 6)} == {1, 2}


def test_every_mesh_has_all_devices_and_their_number_is_bounded():
    meshes = tried(MIXTRAL, {"data.max_length": 32768, "train.batch_size": 256}, "v5e:16x16", 8)
    assert {m.data * m.fsdp * m.expert * m.context * m.tensor for m in meshes} == {256}
    assert len(set(meshes)) < 500 and len(meshes) < 10_000


@pytest.mark.parametrize(
    ("path", "overrides", "axis"), [(LLAMA, LONG, "context"), (MIXTRAL, {}, "expert")], ids=["context", "expert"]
)
def test_a_candidate_with_each_axis_is_estimated_and_can_be_pasted(path, overrides, axis):
    run = config.load(path, overrides)
    result = plan_search.search(
        run, "v5e:4x4", 1, compiles=0, level="O1", prices=None, length=length_of(run, tokens=10**7)
    )
    candidates = [c for c in result["candidates"] if f"mesh.{axis}=1 " not in c["overrides"]]
    assert candidates and all(math.isfinite(c["step_seconds"]) for c in candidates)
    pasted = [part.removeprefix("--config.") for part in candidates[0]["overrides"].split()]
    values = [f"{name}={value}" for name, value in overrides.items()]
    again = config.load(path, values + pasted)
    assert getattr(again.mesh, axis) > 1
    # The pasted config gives the same estimate, on a mesh that the run itself would use.
    step = sharded_step_of(abstract_step_of(again, shapes_of(again)[0], 1000), again, parse("v5e:4x4"), real=False)
    estimate = estimate_step(step)
    assert estimate.memory.peak == candidates[0]["hbm_peak_bytes"]
    assert any(axis in transfer.axes for transfer in estimate.costs.transfers)


def test_the_last_part_of_a_row_has_most_to_do():
    run = config.load(LLAMA, LONG)
    abstract_step = abstract_step_of(run, shapes_of(run)[0], 1000)
    whole, parts = (abstract_step.sizes.attention_flops(2, 32768, parts=parts) for parts in (1, 4))
    # Of 16 squares with 4 halves on the diagonal, the last row has 3.5, and there are 8 in all.
    assert parts / whole == pytest.approx(4 * 3.5 / 8, rel=1e-4)
    assert abstract_step.sizes.attention_flops(2, 32768, parts=4, balanced=True) == whole
