"""A run that is watched tells its phases and exports its checkpoints; one that is stopped in an evaluation goes on."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.numpy import load_file

import jaxft
from jaxft.errors import Preempted
from jaxft.runs import train as train_module
from jaxft.sharding import distributed
from jaxft.training.log import TIMING_KEYS, read_metrics
from jaxft.training.watch import Watch

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.py") + ":smoke"
SETTINGS = {
    "eval.metric": None, "export.merged": False, "checkpoint.every": 2, "checkpoint.keep": 5, "mesh.fsdp": 1,
    "mesh.data": -1, "data.max_length": 400, "data.packing": False, "data.eval_limit": 16, "train.eval_every": 2,
    "checkpoint.best_metric": "eval_loss",
}  # fmt: skip


def adapter(folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapter_model.safetensors")


def train(folder: Path, watch: Watch | None = None) -> dict[str, Any]:
    config = jaxft.get_config(CONFIG, {**SETTINGS, "output_dir": str(folder)})
    return train_module.train(config, console=Console(quiet=True), watch=watch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Any]]]:
    """(a folder with a run and its first checkpoint's export, what was told)."""
    folder, seen = tmp_path_factory.mktemp("watched"), list[Any]()

    def export(step: int, write: Any) -> None:
        seen.append(f"export {step}")
        (folder / "early").mkdir()
        write(folder / "early")

    with pytest.MonkeyPatch.context() as patch:
        # Between all phases a request to stop is looked for, with the newest step that is saved.
        patch.setattr(train_module, "stop_if_requested", seen.append)
        train(folder / "run", Watch(phase=seen.append, export=export))
    yield folder, seen


def test_phases_are_told_and_checkpoints_are_exported_as_they_are(whole, tmp_path):
    folder, seen = whole
    assert seen == [0, "loading", 0, 0, "training", "export 2", 4, "exporting", 4, 4, 4]
    early, last = adapter(folder / "early"), adapter(folder / "run" / "adapter")
    assert early.keys() == last.keys() and any((early[name] != last[name]).any() for name in early)
    jaxft.export(str(folder / "run"), str(tmp_path / "exported"), format="adapter", step=2)
    assert all((early[name] == value).all() for name, value in adapter(tmp_path / "exported").items())


@pytest.mark.slow
@pytest.mark.parametrize("question", [3, 6])  # the second batch after step 2, the first one after step 4
def test_a_stop_within_an_evaluation_costs_nothing(whole, tmp_path, monkeypatch, question):
    asked = itertools.count(1)
    monkeypatch.setattr(distributed, "reached_preemption", lambda: next(asked) == question)
    with pytest.raises(Preempted) as stopped:
        train(tmp_path / "run")
    step = stopped.value.step
    before = read_metrics(tmp_path / "run")
    assert not [row for row in before if "eval_loss" in row and row["step"] == step] and before[-1]["step"] == step
    summary = train(tmp_path / "run")
    expected, found = adapter(whole[0] / "run" / "adapter"), adapter(tmp_path / "run" / "adapter")
    assert all((expected[name] == value).all() for name, value in found.items()) and found.keys() == expected.keys()
    rows = [[timeless(row) for row in read_metrics(one)] for one in (whole[0] / "run", tmp_path / "run")]
    assert rows[0] == rows[1] and summary["eval_loss"] == rows[0][-1]["eval_loss"]


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in TIMING_KEYS}
