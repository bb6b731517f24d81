"""`jaxft verify`: every kind of damage is told with its mend, whole things are whole, and nothing is written."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jaxft import cli, models
from jaxft.assets import ASSETS
from jaxft.checkpoint import hf, manifest
from jaxft.checkpoint.folders.sums import check_sums, write_sums
from jaxft.config import load
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import CheckpointError, ConfigError, DataError, PodError
from jaxft.files.locks.lock import lock
from jaxft.pods.attempts.lead import verify_run
from jaxft.pods.attempts.outputs import Mounted
from jaxft.runs.identity import exports, record
from jaxft.runs.survey.verify import verify
from jaxft.runs.train import set_up

ROWS = [{"prompt": f"Colour {n}?", "completion": f" {n} red"} for n in range(8)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a model, and a run on it with two steps, metrics and an export."""
    folder = tmp_path_factory.mktemp("whole")
    config = json.loads((ASSETS / "smoke" / "config.json").read_text())
    (folder / "base").mkdir()
    model = models.random_model(models.config_from_hf(config), dtype="float32", param_dtype="float32", seed=0)
    hf.write_weights(model, str(folder / "base"))
    hf.write_config(str(folder / "base"), config, dtype="float32")
    load_tokenizer(ASSETS / "smoke").save(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    overrides = {
        "model.path": str(folder / "base"), "data.train": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "run"), "data.max_length": 64, "train.batch_size": 8, "train.steps": 8,
    }  # fmt: skip
    set_up(load(None, [f"{key}={value}" for key, value in overrides.items()]))
    for step in (4, 8):
        (folder / "run" / "checkpoints" / str(step) / "state").mkdir(parents=True)
        (folder / "run" / "checkpoints" / str(step) / "state" / "arrays").write_bytes(bytes(range(256)))
        manifest.write(folder / "run" / "checkpoints" / str(step))
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 9)]
    (folder / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    target = Path(exports.begin_export(folder / "run", "model"))
    shutil.copytree(folder / "base", target, dirs_exist_ok=True)
    write_sums(target)
    exports.end_export(folder / "run", "model")
    (folder / "run" / "summary.json").write_text('{"steps": 8}')
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of the run, whose base and rows are where they were."""
    return shutil.copytree(whole / "run", tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_a_whole_run_is_whole_and_nothing_is_written(whole, capsys):
    before = contents(whole)
    assert cli.main(["verify", str(whole / "run")]) == 0
    text = capsys.readouterr().out
    assert "broken" not in text and "not checked" not in text
    for part in (
        "checkpoints/4",
        "checkpoints/8",
        "metrics.jsonl: 8 rows",
        "model: every file",
        "data.train, tokenizer",
    ):
        assert part in text
    assert contents(whole) == before


def test_a_run_that_was_brought_home_is_examined_without_its_base(run, monkeypatch):
    """Neither the base nor the rows are looked for: for a name on the hub that would be gigabytes."""
    looked_for: list[str] = []

    def not_there(config):
        looked_for.append(config.model.path)
        raise DataError("not on this machine")

    monkeypatch.setattr("jaxft.runs.identity.contents.base_read", not_there)
    monkeypatch.setattr("jaxft.runs.survey.verify._reads_of", not_there)
    verify_run(Mounted(run.parent))
    assert looked_for == []
    flip(run / "checkpoints" / "8" / "state" / "arrays")
    with pytest.raises(PodError, match="is not whole: checkpoints/8"):
        verify_run(Mounted(run.parent))
    assert looked_for == []
    verify(run)  # what is left out there
    assert len(looked_for) == 2


DAMAGES = {
    "a flipped bit in a checkpoint": (
        lambda run: flip(run / "checkpoints/4/state/arrays"), "checkpoints/4", "damaged", "Copy the step again",
    ),
    "a checkpoint without its manifest": (
        lambda run: (run / "checkpoints/8/manifest.json").unlink(), "checkpoints/8", "has no manifest", "Copy manifest",
    ),
    "a lost file of an export": (
        lambda run: (run / "model/tokenizer.json").unlink(), "model", "tokenizer.json is missing", "give the command",
    ),
    "a flipped bit in an export": (
        lambda run: flip(run / "model/model.safetensors"), "model", "is damaged or was changed", "give the command",
    ),
    "an export that was cut off": (
        lambda run: (run / "model/model.safetensors").write_bytes((run / "model/model.safetensors").read_bytes()[:-9]),
        "model", "model.safetensors", "give the command",
    ),
    "an export that was not finished": (
        lambda run: record.write_record(run, record.Record(exports={"model": None})), "model", "was stopped before",
        "give the command",
    ),
    "metrics with a hole": (
        lambda run: (run / "metrics.jsonl").write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 3}\n'), "metrics.jsonl",
        "line 2 of 3", "Restore",
    ),
    "metrics of two runs": (
        lambda run: (run / "metrics.jsonl").write_text('{"step": 2}\n{"step": 1}\n'), "metrics.jsonl", "two runs", "Re",
    ),
    "a damaged mark": (lambda run: (run / "jaxft_run.json").write_text("{"), "jaxft_run.json", "cannot be read", None),
    "a damaged config": (lambda run: (run / "config.json").write_text("{"), "config.json", "config.json", None),
    "damaged scores": (lambda run: (run / "scores.json").write_text("[" * 10**5), "scores.json", "damaged", "Delete"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_with_its_mend(run, name, capsys):
    damage, part, text, mend = DAMAGES[name]
    damage(run)
    before = contents(run)
    assert cli.main(["verify", str(run), "--no_rows", "--json"]) == 2
    captured = capsys.readouterr()
    assert re.search("is not whole: .* damage", captured.err)
    broken = [one for one in json.loads(captured.out)["parts"] if one["state"] == "broken" and one["part"] == part]
    assert broken and any(text in one["text"] for one in broken)
    assert mend is None or any(mend in one.get("mend", "") for one in broken)
    assert contents(run) == before


FILES = (
    "jaxft_run.json", "config.json", "summary.json", "data.json", "metrics.jsonl", "command.txt", "jaxft_lock.json",
    "checkpoints/8/manifest.json", "model/config.json", "model/SHA256SUMS", "model/tokenizer.json",
)  # fmt: skip
CONTENTS = (
    b"",
    b"null",
    b"3",
    b'"x"',
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b"\xff\xfe",
    b"\0" * 50,
    b'{"jaxft_run": 1}',
)


@pytest.mark.parametrize("file", [FILES[0], *(pytest.param(file, marks=pytest.mark.slow) for file in FILES[1:])])
def test_no_content_of_a_file_is_a_traceback(run, file, capsys):
    for content in CONTENTS:
        (run / file).write_bytes(content)
        assert cli.main(["verify", str(run), "--no_rows"]) in (0, 2)
        assert cli.main(["runs", str(run)]) == 0
        assert "Traceback" not in capsys.readouterr().err


def damaged(content: bytes, draw: random.Random) -> bytes:
    """JSON with another value somewhere, or any file with other bytes."""
    values = [None, True, -1, 1.5, 10**400, float("nan"), "x", [], ["x"], {}, {"a": 1}, [None]]

    def other(value):
        if isinstance(value, dict) and value and draw.random() < 0.7:
            name = draw.choice(list(value))
            return {key: other(one) if key == name else one for key, one in value.items()}
        if isinstance(value, list) and value and draw.random() < 0.5:
            return [other(value[0]), *value[1:]]
        return draw.choice(values)

    try:
        return json.dumps(other(json.loads(content))).encode()
    except ValueError:
        raw = bytearray(content)
        raw[draw.randrange(len(raw))] = draw.randrange(256)
        return bytes(raw)


@pytest.mark.slow
def test_a_thousand_damages_are_no_tracebacks(run, capsys):
    draw = random.Random(16)
    for number in range(1000):
        path = run / draw.choice([file for file in FILES if (run / file).exists()])
        content = path.read_bytes()
        path.write_bytes(damaged(content, draw))
        assert cli.main(["verify", str(run), "--no_rows"]) in (0, 2), (number, path)
        assert cli.main(["runs", str(run)]) == 0, (number, path)
        path.write_bytes(content)
        capsys.readouterr()


def test_what_the_run_reads_is_compared_with_its_record(whole, run):
    config = json.loads((run / "config.json").read_text())
    other = run.parent / "rows.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:-1]))
    shutil.copytree(whole / "base", run.parent / "base")
    flip(run.parent / "base" / "model.safetensors")
    config["data"]["train"], config["model"]["path"] = str(other), str(run.parent / "base")
    (run / "config.json").write_text(json.dumps(config))
    broken = {one.part: one.text for one in verify(run).all if one.state == "broken"}
    assert set(broken) == {"model.path", "what the run reads"}
    assert "the content of" in broken["model.path"] and "now 7 examples" in broken["what the run reads"]
    other.unlink()
    shutil.rmtree(run.parent / "base")
    unchecked = {one.part for one in verify(run).all if one.state == "not checked"}
    assert {"model.path", "what the run reads"} <= unchecked and verify(run).is_whole


def test_leftovers_are_told_and_are_no_damage(run):
    (run / "adapter.partial").mkdir()
    (run / "config.json.tmp").write_text("{")
    findings = verify(run, rows=False)
    assert findings.is_whole
    assert {"adapter.partial", "config.json.tmp"} <= {one.part for one in findings.all if one.state == "not checked"}


def test_a_run_that_is_being_written_is_not_called_broken(run):
    (run / "checkpoints/8/manifest.json").unlink()
    with lock(run, "jaxft train", inside=True):
        findings = verify(run, rows=False)
    assert findings.is_whole and "writes there" in findings.all[0].text
    assert not verify(run, rows=False).is_whole


def test_a_model_without_checksums_says_so_and_its_tensors_are_compared_with_its_config(whole, tmp_path):
    base = shutil.copytree(whole / "base", tmp_path / "base")
    assert [one.state for one in verify(base).all] == ["not checked", "whole"]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    (broken,) = (one for one in verify(base).all if one.state == "broken")
    assert "missing" in broken.text and "copy it again" in broken.mend
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert not verify(tmp_path / "cut.gguf").is_whole


@pytest.mark.parametrize(("name", "text"), [("absent", "is not there"), ("empty", "neither a run folder nor a model")])
def test_what_is_no_run_and_no_model_is_refused(tmp_path, name, text):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=text):
        verify(tmp_path / name)


def test_checksums_are_those_of_sha256sum_and_leave_the_card_free(tmp_path):
    (tmp_path / "in").mkdir()
    for name, text in {"a": "x", "in/b c": "y", "README.md": "card"}.items():
        (tmp_path / name).write_text(text)
    write_sums(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "added").write_text("z")
    assert check_sums(tmp_path) == []
    if shutil.which("sha256sum"):
        done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout == "a: OK\nin/b c: OK\n"
    (tmp_path / "a").write_text("changed")
    (tmp_path / "in" / "b c").unlink()
    assert [problem.split(" is ")[0] for problem in check_sums(tmp_path)] == ["a", "in/b c"]
    for text in ("", "x\n", f"{'0' * 64}  ../a\n", f"{'0' * 64}  /etc/passwd\n"):
        (tmp_path / "SHA256SUMS").write_text(text)
        with pytest.raises(CheckpointError, match="SHA256SUMS is damaged"):
            check_sums(tmp_path)
