"""A run that is watched: it tells its phases, and its checkpoints are exported while it trains."""

from pathlib import Path

from rich.console import Console
from safetensors.numpy import load_file

import jaxft
from jaxft.runs import train as train_module
from jaxft.training.watch import Watch

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.py") + ":smoke"
SETTINGS = {
    "eval.metric": None, "export.merged": False, "checkpoint.every": 2, "checkpoint.keep": 5, "mesh.fsdp": 1,
    "mesh.data": -1, "data.max_length": 400,
}  # fmt: skip


def adapter(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


def test_phases_are_told_and_checkpoints_are_exported_as_they_are(tmp_path, monkeypatch):
    seen = []
    # Between all phases a request to stop is looked for, with the newest step that is saved.
    monkeypatch.setattr(train_module, "stop_if_requested", seen.append)

    def export(step: int, write) -> None:
        seen.append(f"export {step}")
        (tmp_path / "early").mkdir()
        write(tmp_path / "early")

    config = jaxft.get_config(CONFIG, {**SETTINGS, "output_dir": str(tmp_path / "run")})
    train_module.train(config, console=Console(quiet=True), watch=Watch(phase=seen.append, export=export))
    assert seen == [0, "loading", 0, 0, "training", "export 2", 4, "exporting", 4, 4, 4]
    early, last = adapter(tmp_path / "early"), adapter(tmp_path / "run" / "adapter")
    assert early.keys() == last.keys() and any((early[name] != last[name]).any() for name in early)
    jaxft.export(str(tmp_path / "run"), str(tmp_path / "exported"), format="adapter", step=2)
    assert all((early[name] == value).all() for name, value in adapter(tmp_path / "exported").items())
