"""GPUs that are not here: which can be compiled for, and, where the plugin is installed, a small step that is."""

from pathlib import Path

import pytest

from jaxft import config
from jaxft.hardware import gpu_compile
from jaxft.hardware.chips import CHIPS
from jaxft.hardware.topology import parse
from jaxft.planning import process as planning
from jaxft.planning.shapes import length_of

SMOKE = f"{Path(__file__).parents[2] / 'configs' / 'llama3_1_8b_lora.py'}:smoke"
HALF = ["train.batch_size=8", "train.accumulation_steps=1", "model.remat=full", "model.dtype=bfloat16"]


@pytest.mark.parametrize(
    ("topology", "slices", "expected"),
    [("h100:1", 1, True), ("h200:8", 1, True), ("h100:8", 2, False), ("l4:1", 1, False), ("v5e:1x1", 1, False)],
)
def test_known_cards_of_one_host_can_be_compiled_for(topology, slices, expected, monkeypatch):
    monkeypatch.setattr(gpu_compile, "has_plugin", lambda: True)
    assert gpu_compile.can_compile(parse(topology, slices)) == expected
    monkeypatch.setattr(gpu_compile, "has_plugin", lambda: False)
    assert not gpu_compile.can_compile(parse(topology, slices))


def test_cards_are_those_of_the_table_of_chips():
    for name, card in gpu_compile.CARDS.items():
        assert card.memory == pytest.approx(CHIPS[name].hbm_bytes, rel=0.07)
        assert card.bandwidth == pytest.approx(CHIPS[name].hbm_bandwidth, rel=0.01)


def test_a_small_step_is_compiled_for_gpus():
    if not gpu_compile.has_plugin():
        pytest.skip("JAX's CUDA plugin is not installed: pip install 'jaxft[plan_gpu]'")
    run = config.load(SMOKE, HALF)
    plan = planning.plan(run, parse("h100:4"), level="O1", prices=None, length=length_of(run))
    assert plan["compiled"] and plan["fits"] and plan["hbm_peak_bytes"] > plan["argument_bytes"]
    assert plan["hardware_flops_per_step"] > plan["model_flops_per_step"]
    assert plan["collective_bytes_by_axis"].keys() == {"fsdp"}
    assert not [line for line in plan["unknown"] if "counted as none" in line]
