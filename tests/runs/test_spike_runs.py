"""Whole runs that diverge or have a spike: what they save, how they end, and that their messages' remedies work."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.numpy import load_file

import jaxft
from jaxft.errors import CheckpointError
from jaxft.training.log import TIMING_KEYS, read_metrics
from jaxft.training.spikes import SpikeError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SMALL = {
    "data.max_length": 64, "data.packing": False, "data.shuffle": False, "train.batch_size": 8, "train.log_every": 1,
    "train.accumulation_steps": 1, "checkpoint.every": 1, "checkpoint.keep": 50, "eval.metric": None,
    "optim.schedule": "constant", "optim.warmup_ratio": None, "optim.min_ratio": 0.0, "optim.weight_decay": 0.0,
    "export.merged": False, "mesh.fsdp": 1, "mesh.data": -1, "data.eval": None, "data.limit": None,
    "checkpoint.best_metric": None,
}  # fmt: skip


def train(folder, **overrides):
    config = jaxft.get_config(
        str(ROOT / "configs" / "smollm2_135m_lora.py") + ":smoke", SMALL | {"output_dir": str(folder)} | overrides
    )
    return jaxft.train(config, console=Console(quiet=True))


def timeless(folder):
    return [{key: value for key, value in row.items() if key not in TIMING_KEYS} for row in read_metrics(folder)]


def saved(folder):
    steps = folder / "checkpoints"
    return sorted(int(step.name) for step in steps.iterdir() if step.name.isdigit()) if steps.is_dir() else []


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of one simple pattern, and a batch of noise in the middle, of the 17th step."""
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    noise = "qzxjvkwpbgfy#@!%^&*()_+{}|:<>?~`"
    lines = [{"prompt": "say", "completion": " yes yes yes yes"} for _ in range(24 * 8)]
    for at in range(16 * 8, 17 * 8):
        lines[at]["completion"] = "".join(noise[(at * 7 + i * i) % len(noise)] for i in range(40))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"data.train": str(path), "train.steps": 24, "optim.learning_rate": 0.003, "train.spike_window": 8}


def test_an_update_that_overflows_is_not_saved_and_skip_goes_on(tmp_path, rows):
    """The first update makes weights infinite, while its loss and gradient are finite."""
    overflow = {"optim.learning_rate": 3e38, "optim.weight_decay": 1e4, "train.steps": 1}
    settings = {"data.train": rows["data.train"], **overflow}
    with pytest.raises(CheckpointError, match=r"step 1 is not saved: .*trainable.*no earlier step is whole"):
        train(tmp_path / "run", **settings)
    assert saved(tmp_path / "run") == [] and not (tmp_path / "run" / "adapter").exists()
    summary = train(tmp_path / "run", **settings, **{"train.on_spike": "skip"})
    assert summary["skipped_updates"] == summary["spikes"] == 1 and saved(tmp_path / "run") == [1]


def test_a_batch_of_noise_is_skipped_or_stops_and_a_resumed_run_decides_alike(tmp_path, rows):
    skip = {**rows, "train.on_spike": "skip"}
    summary = train(tmp_path / "whole", **skip)
    counts = {row["step"]: row["skipped_updates"] for row in timeless(tmp_path / "whole")}
    assert summary["skipped_updates"] == counts[24] and counts[17] == counts[16] + 1
    first = min(step for step, count in counts.items() if count)
    assert "Updates left out" in (tmp_path / "whole" / "report.html").read_text()
    # Interrupted before the spike, and after it while it is in the window.
    for last in (12, 19):
        again = tmp_path / f"from {last}"
        shutil.copytree(tmp_path / "whole", again)
        for step in saved(again):
            if step > last:
                shutil.rmtree(again / "checkpoints" / str(step))
        train(again, **skip)
        assert timeless(again) == timeless(tmp_path / "whole")
        weights = "adapter/adapter_model.safetensors"
        assert (again / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    with pytest.raises(SpikeError, match=rf"spike at step {first}: .*step {first - 1} is saved.*'skip' goes on"):
        train(tmp_path / "stops", **rows, **{"train.on_spike": "stop", "checkpoint.every": 100})
    assert saved(tmp_path / "stops") == [first - 1]
    train(tmp_path / "stops", **skip, **{"checkpoint.every": 100})
    for name, value in load_file(tmp_path / "whole/adapter/adapter_model.safetensors").items():
        assert (value == load_file(tmp_path / "stops/adapter/adapter_model.safetensors")[name]).all()
