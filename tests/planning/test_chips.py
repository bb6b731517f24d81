"""A small step compiled for every kind of TPU, by the pair of jax and libtpu that is installed."""

from importlib.metadata import version
from pathlib import Path

import pytest

from jaxft import config
from jaxft.hardware.topology import parse
from jaxft.planning import process as planning
from jaxft.planning.shapes import length_of

SMOKE = f"{Path(__file__).parents[2] / 'configs' / 'llama3_1_8b_lora.py'}:smoke"


@pytest.mark.parametrize("topology", ["v4:1x1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1"])
def test_a_small_step_is_compiled(topology):
    if topology.startswith("tpu7x") and version("jax").startswith("0.10."):
        pytest.skip("libtpu of this jax ends its process for tpu7x")
    run = config.load(SMOKE, ["train.batch_size=2", "train.accumulation_steps=1", "model.remat=full"])
    plan = planning.plan(run, parse(topology), level="O1", prices=None, length=length_of(run))
    assert plan["compiled"] and plan["refused"] is None and plan["hbm_peak_bytes"] > plan["argument_bytes"]
    assert not [line for line in plan["unknown"] if "libtpu" in line]
