"""The folder of a run: recognised by its mark, never made of what others wrote, and what becomes of its files."""

import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

import jaxft
from jaxft.checkpoint.folders.sums import write_sums
from jaxft.checkpoint.hub.card import MARK as CARD_MARK
from jaxft.config import RunConfig, with_overrides
from jaxft.errors import CheckpointError, ConfigError, ExportError
from jaxft.files.run_folder import is_run_folder
from jaxft.files.targets import check_new_file
from jaxft.runs.export import export
from jaxft.runs.folder import newest_step, open_run, refuse_other_base, run_config
from jaxft.runs.identity import exports, record
from jaxft.runs.quickstart import quickstart


def config_of(folder: Path, **overrides) -> RunConfig:
    return with_overrides({"output_dir": str(folder), "model.path": "model", "data.train": "rows.jsonl"} | overrides)


def start(config: RunConfig) -> list[str]:
    return open_run(config, reads={"data.train": {"path": "rows.jsonl", "digest": "0"}}, steps=8, data={"rows": 1})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoint(folder: Path, step: int = 4) -> None:
    """A step as `RunCheckpoints` leaves it: the manifest makes it whole."""
    (folder / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / "checkpoints" / str(step) / "manifest.json").write_text("{}")


FOREIGN = {
    "a model": {"config.json": '{"model_type": "llama"}', "chat_template.jinja": "x", "data.json": "1"},
    "an empty config": {"config.json": ""},
    "a config that is a list": {"config.json": "[]"},
    "sections of another trainer": {"config.json": '{"model": {}, "data": {}, "train": {}, "output_dir": "x"}'},
    "a trainer's checkpoints": {"checkpoints/100/optimizer.bin": "x"},
    "a summary": {"summary.json": "{}"},
    "exports": {"adapter/adapter_config.json": "{}"},
    "notes": {"notes.txt": "x"},
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_wrote_is_not_overwritten(tmp_path, name):
    for file, text in FOREIGN[name].items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    before = contents(tmp_path)
    assert not is_run_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"is not empty and holds no run.*Set output_dir to a new folder"):
        start(config_of(tmp_path))
    with pytest.raises(ConfigError, match="is not a run folder"):
        run_config(tmp_path)
    assert contents(tmp_path) == before


def test_a_new_folder_gets_the_mark_and_keeps_its_id(tmp_path):
    folder = tmp_path / "a" / "run"
    start(config_of(folder))
    first = record.read_record(folder)
    assert is_run_folder(folder) and run_config(folder) == config_of(folder)
    checkpoint(folder)
    start(config_of(folder, **{"train.log_every": 1}))
    assert record.read_record(folder) == first and newest_step(folder) == 4


def test_a_run_from_before_the_mark_is_known_by_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of(tmp_path).to_dict()))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("ours or not, an earlier version kept no list")
    checkpoint(tmp_path)
    assert is_run_folder(tmp_path)
    with pytest.raises(ConfigError, match="optim.learning_rate: was"):
        start(config_of(tmp_path, **{"optim.learning_rate": 1.0}))
    start(config_of(tmp_path))
    assert (tmp_path / "jaxft_run.json").is_file()


def test_a_config_that_another_program_wrote_into_a_run_is_refused(tmp_path):
    start(config_of(tmp_path / "run"))
    checkpoint(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"config\.json is missing or not that of a run.*Restore"):
        start(config_of(tmp_path / "run"))


def test_a_damaged_mark_is_refused(tmp_path):
    start(config_of(tmp_path))
    (tmp_path / "jaxft_run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"jaxft_run\.json cannot be read.*Delete it"):
        start(config_of(tmp_path))


def test_a_run_without_checkpoints_begins_anew_without_what_another_left(tmp_path):
    start(config_of(tmp_path))
    first = record.read_record(tmp_path).id
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("drawn with another seed")
    (tmp_path / "notes.txt").write_text("mine")
    start(config_of(tmp_path))
    assert (tmp_path / "base").is_dir() and record.read_record(tmp_path).id == first
    start(config_of(tmp_path, seed=1))
    assert not (tmp_path / "base").exists() and (tmp_path / "notes.txt").read_text() == "mine"
    assert record.read_record(tmp_path).id != first and run_config(tmp_path).seed == 1


@pytest.mark.parametrize("name", ["4/state/d/0", "4.unexplained-20260101T000000/state/d/0", "notes.txt"])
def test_what_is_no_leftover_among_checkpoints_is_set_aside(tmp_path, caplog, name):
    """A copy that left files without an ending out, say, has a step without anything that tells of it."""
    start(config_of(tmp_path))
    for one in (name, "2.saving-1/state/d/0"):
        (tmp_path / "checkpoints" / one).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkpoints" / one).write_text("x")
    start(config_of(tmp_path))  # the same run goes on
    assert (tmp_path / "checkpoints" / name).exists() and not caplog.text
    start(config_of(tmp_path, seed=1))
    assert (tmp_path / "checkpoints.before-1" / name).read_text() == "x" and not (tmp_path / "checkpoints").exists()
    assert "checkpoints.before-1: it has " + name.partition("/")[0] in caplog.text


def test_leftovers_of_saves_go_with_a_run_that_begins_anew(tmp_path):
    start(config_of(tmp_path))
    for one in ("2.saving-1", "4.deleted"):
        (tmp_path / "checkpoints" / one / "state").mkdir(parents=True)
    start(config_of(tmp_path, seed=1))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoints")]


@pytest.mark.parametrize("left", ["summary.json", "adapter", "model"])
def test_a_finished_run_whose_checkpoints_are_gone_is_not_overwritten(tmp_path, left):
    start(config_of(tmp_path))
    checkpoint(tmp_path, 8)
    if left == "summary.json":
        (tmp_path / left).write_text("{}")
    else:
        (Path(exports.begin_export(tmp_path, left)) / "weights").write_text("x")
        exports.end_export(tmp_path, left)
    start(config_of(tmp_path))
    shutil.rmtree(tmp_path / "checkpoints")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"has ended, and its checkpoints are gone.*delete this one"):
        start(config_of(tmp_path))
    assert contents(tmp_path) == before


def export_of(folder: Path, name: str, **files: str) -> None:
    """An export as a run writes it, with its checksums and a card."""
    target = Path(exports.begin_export(folder, name))
    for file, text in files.items():
        (target / file).write_text(text)
    write_sums(target)
    (target / "README.md").write_text(f"{CARD_MARK} card")
    exports.end_export(folder, name)


def test_an_export_replaces_what_the_run_exported(tmp_path):
    start(config_of(tmp_path))
    export_of(tmp_path, "adapter", weights="first", other="x")
    export_of(tmp_path, "adapter", weights="second")
    assert sorted(os.listdir(tmp_path / "adapter")) == ["README.md", "SHA256SUMS", "weights"]
    assert (tmp_path / "adapter" / "weights").read_text() == "second"
    assert not [name for name in os.listdir(tmp_path) if "before" in name or "partial" in name or "deleted" in name]


def test_an_export_that_was_interrupted_leaves_the_earlier_one_and_is_cleaned_up(tmp_path):
    start(config_of(tmp_path))
    export_of(tmp_path, "adapter", weights="first")
    (Path(exports.begin_export(tmp_path, "adapter")) / "half").write_text("killed while it was written")
    assert (tmp_path / "adapter" / "weights").read_text() == "first"
    assert os.listdir(exports.begin_export(tmp_path, "adapter")) == [".jaxft_unfinished"]


OTHERS = {
    "a file of the user": lambda export: (export / "model-q4.gguf").write_text("mine"),
    "a file that the user changed": lambda export: (export / "weights").write_text("mine"),
    "an export of which nothing is recorded": lambda export: record.write_record(export.parent, record.Record()),
    "a link": lambda export: (export.rename(export.parent / "x"), export.symlink_to(export.parent / "x")),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("replace", ["export", "clear"])
def test_what_is_not_the_runs_own_is_set_aside_and_told(tmp_path, name, replace, caplog):
    start(config_of(tmp_path))
    export_of(tmp_path, "adapter", weights="first")
    OTHERS[name](tmp_path / "adapter")
    before = contents(tmp_path / "adapter")
    checkpoint(tmp_path)
    start(config_of(tmp_path))  # it is no reason to refuse the run
    export_of(tmp_path, "adapter", weights="second") if replace == "export" else exports.clear(tmp_path)
    assert contents(tmp_path / "adapter.before-1") == before
    assert "is kept as" in caplog.text and "adapter.before-1" in caplog.text
    if replace == "export":
        assert (tmp_path / "adapter" / "weights").read_text() == "second"
        (tmp_path / "adapter" / "model-q4.gguf").write_text("mine too")
        export_of(tmp_path, "adapter", weights="third")
        assert (tmp_path / "adapter.before-2" / "model-q4.gguf").read_text() == "mine too"


def test_a_folder_under_the_name_of_an_unfinished_export_is_set_aside(tmp_path):
    start(config_of(tmp_path))
    (tmp_path / "adapter.jaxft.partial").mkdir()
    (tmp_path / "adapter.jaxft.partial" / "mine").write_text("mine")
    export_of(tmp_path, "adapter", weights="first")
    assert contents(tmp_path / "adapter.jaxft.partial.before-1") == {"mine": b"mine"}


def test_a_card_of_the_user_is_kept(tmp_path):
    start(config_of(tmp_path))
    export_of(tmp_path, "adapter", weights="first")
    (tmp_path / "adapter" / "README.md").write_text("my card")
    export_of(tmp_path, "adapter", weights="second")
    assert (tmp_path / "adapter" / "README.md").read_text() == "my card"
    assert not (tmp_path / "adapter.before-1").exists()


def test_places_where_no_run_can_be_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, message in {
        tmp_path / "file": "is a file. Set it to a new folder",
        tmp_path / "file" / "below": "cannot be written: .*file is a file, not a folder",
        "/proc/run": "cannot be written. .*/proc/run: .*place where you may write",
        tmp_path / ("x" * 300): "cannot be written: its part x+... has 300 bytes",
        "s3://bucket/run": "is an address.*mount the store",
    }.items():
        with pytest.raises(ConfigError, match=message):
            start(config_of(path))
    assert os.listdir(tmp_path) == ["file"]


def test_exports_are_not_written_to_files_and_forbidden_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="is a file: give a new folder"):
        export("model", str(tmp_path / "file"))
    with pytest.raises(ExportError, match="/proc/export cannot be made.*where you may write"):
        export("model", "/proc/export")


def test_quickstart_deletes_only_a_quickstart_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    settings = (f"model.path={tmp_path / 'model'}", f"output_dir={tmp_path / 'run'}")
    monkeypatch.setattr("jaxft.runs.quickstart.train", lambda config, console: {"config": config})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("of another program")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        quickstart(console=Console(quiet=True), overrides=settings)
    assert (tmp_path / "run" / "summary.json").read_text() == "of another program"
    (tmp_path / "run" / "summary.json").unlink()

    config = quickstart(console=Console(quiet=True), overrides=settings)["config"]
    start(config)
    checkpoint(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text("{}")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match="holds a finished run with other settings.*\n  adapter.r: was 16, now 4\nIt is not deleted"
    ):
        quickstart(console=Console(quiet=True), overrides=(*settings, "adapter.r=4"))
    assert newest_step(tmp_path / "run") == 4
    quickstart(console=Console(quiet=True), overrides=settings)
    assert newest_step(tmp_path / "run") is None and (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_an_adapter_and_scores_are_not_written_over_others(tmp_path):
    (tmp_path / "config.json").write_text("a model")
    with pytest.raises(ExportError, match="is not empty: choose a new folder"):
        jaxft.write_adapter(None, "name", str(tmp_path), model=None)
    (tmp_path / "rows.jsonl").write_text("mine")
    for path, message in {
        "rows.jsonl": "is there already, and is not overwritten",
        "absent/scores.jsonl": "is no folder, so .*make it first",
    }.items():
        with pytest.raises(ExportError, match=message):
            check_new_file(tmp_path / path)
    check_new_file(tmp_path / "scores.jsonl")
    assert contents(tmp_path) == {"config.json": b"a model", "rows.jsonl": b"mine"}


def test_a_run_is_not_read_onto_a_base_with_other_weights(tmp_path):
    start(config_of(tmp_path / "run"))
    reads = {"model.path": {"path": "model", "digest": "a"}}
    record.write_record(tmp_path / "run", record.Record(reads=reads))
    refuse_other_base(tmp_path / "run", {"model.path": {"path": "moved", "digest": "a"}})
    with pytest.raises(ConfigError, match="was trained on model, and the weights of other are others.*Give the base"):
        refuse_other_base(tmp_path / "run", {"model.path": {"path": "other", "digest": "b"}})
