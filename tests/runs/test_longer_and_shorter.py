"""Runs that end early, export their best step, or go on for longer: exact after any interruption."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

import jaxft
from jaxft.assets import ASSETS
from jaxft.runs.export import load_trained
from jaxft.training.log import TIMING_KEYS, read_metrics
from jaxft.training.state import divide

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def train(folder: Path, **overrides) -> dict:
    """A run that gets worse soon: its rate is far too high."""
    settings = {
        "output_dir": str(folder), "data.eval": str(ASSETS / "quickstart" / "heldout.jsonl"), "data.max_length": 400,
        "data.limit": 16, "data.packing": False, "train.batch_size": 8, "train.steps": 24, "train.log_every": 1,
        "train.eval_every": 1, "checkpoint.every": 1, "checkpoint.keep": 30, "checkpoint.best_metric": "eval_loss",
        "eval.metric": None, "optim.schedule": "constant", "optim.warmup_ratio": None, "optim.min_ratio": 0.0,
        "optim.learning_rate": 1.0, "mesh.fsdp": 1, "mesh.data": -1,
    }  # fmt: skip
    config = jaxft.get_config(str(ROOT / "configs" / "smollm2_135m_lora.py") + ":smoke", settings | overrides)
    return jaxft.train(config, console=Console(quiet=True))


def metrics(folder: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMING_KEYS} for row in read_metrics(folder)]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(folder, summary) of a run that ended early and exported its best step."""
    folder = tmp_path_factory.mktemp("early") / "run"
    settings = {"train.early_stopping_patience": 2, "export.checkpoint": "best"}
    return folder, train(folder, **settings), settings


def test_a_run_that_gets_worse_ends_early_and_exports_its_best_step(ended):
    folder, summary, _ = ended
    losses = {row["step"]: row["eval_loss"] for row in metrics(folder) if "eval_loss" in row}
    best = min(losses, key=losses.get)
    assert summary["steps"] == max(losses) == best + 2 < 24
    assert summary["exported_step"] == best and summary["eval_loss"] == losses[best]
    # Without a step, all that loads the run takes the exported one.
    by_step, exported = (jax.tree.leaves(divide(load_trained(str(folder), step).module)[1]) for step in (best, None))
    for one, other in zip(by_step, exported, strict=True):
        np.testing.assert_array_equal(one, other)
    first = jaxft.load_model(str(folder)).logits(np.arange(8)[None])
    np.testing.assert_allclose(first, load_trained(str(folder), best).logits(np.arange(8)[None]), atol=1e-5)


def test_a_run_that_loses_its_last_steps_ends_as_before(ended, tmp_path):
    folder, summary, settings = ended
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / str(summary["steps"]))
    summary_again = train(again, **settings)
    other = {"output_dir": "", "goodput": 0, "seconds": 0}  # where it is, and what it took
    assert {**summary_again, **other} == {**summary, **other}
    assert metrics(again) == metrics(folder)
    for name, value in weights(folder).items():
        np.testing.assert_array_equal(weights(again)[name], value)
    # Nothing is trained any more.
    before = json.loads((again / "jaxft_run.json").read_text())
    assert train(again, **settings)["steps"] == summary["steps"]
    assert metrics(again) == metrics(folder) and json.loads((again / "jaxft_run.json").read_text()) == before


def test_a_longer_run_is_that_of_its_length_from_the_beginning(tmp_path):
    settings = {"optim.learning_rate": 1e-3, "adapter.dropout": 0.1}
    train(tmp_path / "whole", **settings, **{"train.steps": 6})
    train(tmp_path / "parts", **settings, **{"train.steps": 4})
    train(tmp_path / "parts", **settings, **{"train.steps": 6})
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        np.testing.assert_array_equal(weights(tmp_path / "parts")[name], value)
    with_other_rows = train(
        tmp_path / "parts", **settings, **{"train.steps": 6, "data.eval_limit": 2, "eval.metric": "exact_match"}
    )
    assert with_other_rows["examples"] == 2
    assert with_other_rows["eval_loss"] != metrics(tmp_path / "whole")[-1]["eval_loss"]
