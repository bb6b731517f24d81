"""Runs whose evaluated weights are not those that are trained: exports and what a checkpoint gives are the average."""

import jax
import numpy as np
import pytest

from jaxft import config
from jaxft.adapters.attach import adapters
from jaxft.checkpoint.load import load_model
from jaxft.runs.export import load_trained
from jaxft.runs.train import train
from jaxft.trees import flatten

RUNS = {
    "schedule-free": {"optim.name": "schedule_free_adamw", "optim.schedule": "constant"},
    "average": {"train.ema_decay": 0.5, "optim.name": "lion"},
    "average left out": {"train.ema_decay": 0.5, "train.use_ema": False},
}


def lora_of(module):
    return {
        f"{path}/{name}": np.asarray(getattr(adapter, name).get_value())
        for path, adapter in adapters(module).items()
        for name in ("lora_a", "lora_b")
    }


@pytest.mark.slow
@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS)
def test_exports_and_checkpoints_give_the_evaluated_weights(fields, tmp_path):
    settings = {"output_dir": str(tmp_path / "run"), "train.steps": 2, "eval.metric": None, "optim.learning_rate": 0.05}
    summary = train(config.load("configs/smollm2_135m_lora.py:smoke", settings | fields))
    assert np.isfinite(summary["eval_loss"])
    from_checkpoint = lora_of(load_trained(str(tmp_path / "run")).module)
    exported = lora_of(load_model(str(tmp_path / "run" / "adapter")).module)
    jax.tree.map(np.testing.assert_array_equal, from_checkpoint, exported)
    assert flatten(from_checkpoint)[0].keys() == exported.keys()
