"""`jaxft runs`: the state of each run, what goes on with it, and names of others on a terminal."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxft import cli
from jaxft.config import RunConfig, with_overrides
from jaxft.errors import ConfigError
from jaxft.files.deadlines import within
from jaxft.files.locks.lock import lock
from jaxft.files.locks.owner import Owner
from jaxft.runs.folder import open_run
from jaxft.runs.survey import listing
from jaxft.runs.survey.listing import describe, runs_below

ROOT = Path(__file__).parents[3]


def config_of(folder: Path) -> RunConfig:
    return with_overrides({"output_dir": str(folder), "model.path": "model", "data.train": "rows.jsonl"})


def begin(folder: Path, *, whole: int | None = None, steps: int = 8) -> Path:
    """A run that was stopped after a checkpoint, or before its first."""
    reads = {"data.train": {"path": "rows.jsonl", "digest": "0"}}
    open_run(config_of(folder), reads=reads, steps=steps, data={"rows": 1})
    if whole is not None:
        (folder / "checkpoints" / str(whole)).mkdir(parents=True)
        (folder / "checkpoints" / str(whole) / "manifest.json").write_text("{}")
        rows = [{"step": step, "loss": 1.0 / step, "goodput": 0.5} for step in range(1, whole + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "lo')
    return folder


def finish(folder: Path) -> Path:
    begin(folder, whole=8)
    (folder / "summary.json").write_text(json.dumps({"steps": 8, "eval_loss": 0.5, "output_dir": "x"}))
    return folder


def states(folder: Path) -> dict[str, str]:
    return {Path(run.folder).name: run.state for run in runs_below(folder)}


def test_each_run_has_its_state(tmp_path, capsys):
    begin(tmp_path / "a" / "stopped", whole=4)
    begin(tmp_path / "a" / "new")
    finish(tmp_path / "b" / "done")
    begin(tmp_path / "live", whole=4)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    with lock(tmp_path / "live", "jaxft train", inside=True):
        assert states(tmp_path) == {
            "stopped": "interrupted", "new": "interrupted", "done": "finished", "live": "running",
        }  # fmt: skip
        assert cli.main(["runs", str(tmp_path), "--json"]) == 0
        runs = {Path(run["folder"]).name: run for run in json.loads(capsys.readouterr().out)["runs"]}
        assert runs["stopped"]["step"] == 4 and runs["stopped"]["steps"] == 8
        assert runs["done"]["metrics"] == {"steps": 8, "eval_loss": 0.5}
        assert runs["live"]["owner"]["what"] == "jaxft train" and runs["live"]["metrics"]["step"] == 4
        assert cli.main(["runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"at step 4 of 8; go on: jaxft train --model=model --data=rows.jsonl --output={tmp_path}/a/stopped" in text
    assert "before its first checkpoint; go on: jaxft train" in text
    assert "step 4 of 8, goodput 50.0%; jaxft train on" in text
    assert "8 steps, eval_loss 0.5000" in text and text.endswith("4 runs: 1 running, 2 interrupted, 1 finished\n")
    assert states(tmp_path / "b" / "done") == {"done": "finished"}


def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path):
    begin(tmp_path / "before", whole=4).rename(tmp_path / "my run")
    (run,) = runs_below(tmp_path)
    assert f"--output={tmp_path}/my run" in run.command and "before" not in run.command


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "jaxft_run.json").write_text("{"), r"jaxft_run\.json cannot be read.*Delete it"),
        (lambda run: (run / "config.json").write_text("{"), r"config\.json is missing, damaged.*restore it"),
        (lambda run: (run / "checkpoints/8/manifest.json").unlink(), r"8 in checkpoints without manifest\.json: copy"),
        (lambda run: (run / "summary.json").write_text("[" * 10**5), r"summary\.json is damaged: delete it and give"),
        (
            lambda run: [
                (run / "checkpoints").rename(run / "x"),
                (run / "adapter").mkdir(),
                (run / "summary.json").unlink(),
            ],
            "its checkpoints are gone, and adapter is left: move what you need",
        ),
    ],
    ids=["mark", "config", "manifest", "summary", "checkpoints"],
)
def test_a_broken_run_says_what_is_broken_and_how_to_mend_it(tmp_path, damage, message):
    damage(finish(tmp_path / "run"))
    (run,) = runs_below(tmp_path)
    assert run.state == "broken"
    with pytest.raises(ValueError, match=message):
        raise ValueError(run.problem)


def test_a_finished_run_without_checkpoints_and_a_session_say_so(tmp_path, capsys):
    shutil.rmtree(finish(tmp_path / "done") / "checkpoints")
    reads = {"model.path": {"path": "m", "digest": "0"}}
    open_run(config_of(tmp_path / "session"), reads=reads)
    (tmp_path / "session" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "session" / "checkpoints" / "3" / "manifest.json").write_text("{}")
    assert cli.main(["runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "eval_loss 0.5000, its checkpoints were deleted" in text
    assert "at step 3; go on: Session.load_state" in text


def test_names_of_others_do_not_reach_the_terminal(tmp_path, capsys):
    finish(tmp_path / "a\x1b[2Jb\nforged  finished")
    assert cli.main(["runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\\x1b[2Jb\\nforged" in text and len(text.splitlines()) == 2


STRANGE = {
    "numbers beyond floats": lambda run: (run / "summary.json").write_text(f'{{"steps": 8, "eval_loss": {10**400}}}'),
    "a zero byte in the command": lambda run: [
        (run / "summary.json").unlink(), (run / "command.txt").write_text("jaxft train '--output=a\0b'")
    ],
    "a pipe for a command": lambda run: [
        (run / "summary.json").unlink(), (run / "command.txt").unlink(), os.mkfifo(run / "command.txt")
    ],
    "a pipe for metrics": lambda run: [
        (run / "summary.json").unlink(), (run / "metrics.jsonl").unlink(), os.mkfifo(run / "metrics.jsonl")
    ],
    "a pipe for a lock": lambda run: os.mkfifo(run / "jaxft_lock.json"),
    "a folder for a lock": lambda run: (run / "jaxft_lock.json").mkdir(),
    "a lock beyond floats": lambda run: (run / "jaxft_lock.json").write_text(
        json.dumps(json.loads(Owner(what="x", machine="another").to_text()) | {"renewed": 10**400})
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_no_run_of_a_stranger_ends_the_list(tmp_path, name, monkeypatch):
    monkeypatch.setattr("jaxft.files.locks.lock.is_of_one_machine", lambda folder: False)  # leases count
    STRANGE[name](finish(tmp_path / "first"))
    finish(tmp_path / "second")
    runs = within(lambda: runs_below(tmp_path), 300)  # the end of a pipe would never come
    stopped = not (tmp_path / "first" / "summary.json").exists()
    assert [run.state for run in runs] == ["interrupted" if stopped else "finished", "finished"]
    assert all(describe(run) for run in runs)


def test_a_run_that_cannot_be_read_is_broken_and_the_others_are_listed(tmp_path, monkeypatch):
    for name in ("first", "second"):
        finish(tmp_path / name)
    read = listing.owner_now

    def fails(folder):
        if folder.name == "first":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return read(folder)

    monkeypatch.setattr(listing, "owner_now", fails)
    first, second = runs_below(tmp_path)
    assert first.state == "broken" and "first: Permission denied. Give yourself permission" in first.problem
    assert second.state == "finished"


def test_a_folder_without_runs_and_one_that_is_not_there(tmp_path, capsys):
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no runs\n"
    with pytest.raises(ConfigError, match="is not there: give the folder in which runs are"):
        runs_below(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        runs_below(tmp_path / "file")


def test_hundreds_of_runs_are_listed_soon_and_without_jax(tmp_path):
    first = begin(tmp_path / "0", whole=4)
    for number in range(1, 300):
        run = tmp_path / str(number)
        (run / "checkpoints" / "4").mkdir(parents=True)
        for name in ("jaxft_run.json", "config.json", "command.txt", "metrics.jsonl", "checkpoints/4/manifest.json"):
            (run / name).write_bytes((first / name).read_bytes())
    start = time.process_time()  # of this process, however busy the machine is
    assert len(runs_below(tmp_path)) == 300
    assert time.process_time() - start < 5
    code = "import sys, jaxft.cli; jaxft.cli.main(['runs', sys.argv[1]]); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("300 runs: 300 interrupted\n"), done.stderr
