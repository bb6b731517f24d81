"""Parts of the service without a server: hyperparameters, configs, the examination of rows, what workers tell."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxft.assets import ASSETS
from jaxft.checkpoint.folders.sums import check_sums, write_sums
from jaxft.errors import ConfigError, DataError
from jaxft.serving.http.archive import tar_pieces
from jaxft.serving.jobs.folder import JobFolder, JobSpec
from jaxft.serving.jobs.hyperparameters import Counts, Hyperparameters, auto_epochs, resolved
from jaxft.serving.jobs.metrics import checkpoint_metrics, step_metrics_csv
from jaxft.serving.jobs.run_config import allowed_keys, check_config, config_of
from jaxft.serving.supervision import processes
from jaxft.serving.supervision.tailing import Tail
from jaxft.serving.supervision.watch import Watch
from jaxft.serving.worker.batch import planned
from jaxft.serving.worker.examine import examine, final_config, tell_examined
from jaxft.serving.worker.naming import name_base
from jaxft.serving.worker.telling import Telling, error_of

ROWS = (ASSETS / "quickstart" / "train.jsonl").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(("rows", "epochs"), [(1, 25), (10, 10), (33, 3), (34, 3), (8333, 3), (12000, 2), (99999, 1)])
def test_epochs_where_the_job_says_auto(rows, epochs):
    assert auto_epochs(rows) == epochs


def test_a_batch_is_requested_in_rows_and_taken_in_sequences():
    packed = Counts(rows=800, sequences=100)
    requested = Hyperparameters(n_epochs=2, batch_size=32, learning_rate_multiplier=2.0)
    assert resolved(requested, packed) == (requested, 4)
    assert resolved(Hyperparameters(n_epochs=1, batch_size=3), packed)[1] == 1
    assert resolved(Hyperparameters(n_epochs=1, batch_size=256), Counts(rows=10, sequences=10))[1] == 10
    assert resolved(Hyperparameters(n_epochs=1, batch_size=5), Counts(rows=100, sequences=100, unit=4))[1] == 8
    numbers, sequences = resolved(Hyperparameters(), packed)
    assert (numbers.n_epochs, sequences, numbers.batch_size, numbers.learning_rate_multiplier) == (3, 8, 64, 1.0)


PATHS = (
    "output_dir", "model.path", "data.train", "data.cache", "data.chat_template", "rewards.functions",
    "train.report_to", "model.allow_unknown", "data.chat_template_kwargs", "data.tfds_data_dir",
)  # fmt: skip


def test_settings_of_jobs_name_no_path_and_no_module():
    keys = allowed_keys()
    assert "adapter.r" in keys and "optim.weight_decay" in keys and "data.max_length" in keys
    for key in PATHS:
        assert key not in keys
        with pytest.raises(ConfigError):
            check_config({key: "x"})
    check_config({"adapter.r": 8, "model.dtype": "bfloat16", "optim.adamw.b1": 0.8})
    for wrong in ({"adapter.r": 0}, {"adapter.r": True}, {"model.dtype": "float8"}, {"optim.name": "adan"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            check_config(wrong)


def make_job(tmp_path: Path, rows: bytes, **settings) -> tuple[JobSpec, JobFolder, Telling]:
    folder = JobFolder(tmp_path / "state" / "jobs" / "ftjob-1")
    folder.path.mkdir(parents=True)
    folder.training.write_bytes(rows)
    values = {"hyperparameters": {"n_epochs": None, "batch_size": None}, "config": {}, **settings}
    spec = JobSpec(id="ftjob-1", name="small", base=str(ASSETS / "smoke"), seed=5, context=4096, **values)
    spec.write(folder)
    assert JobSpec.read(folder) == spec
    return spec, folder, Telling(folder, spec)


def test_the_examination_of_rows_without_jax(tmp_path):
    spec, folder, telling = make_job(tmp_path, b"".join(ROWS[:6]), config={"adapter.r": 4, "data.packing": False})
    folder.validation.write_bytes(b"".join(ROWS[6:8]))
    out = examine(spec, folder, telling)
    assert out["hyperparameters"] == {"n_epochs": 16, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert out["plan"]["steps"] == 24 and out["examination"]["rows"] == 6 and out["examination"]["first_rows"]
    text = "".join(piece["text"] for piece in out["examination"]["first_rows"][0] if piece["trained"])
    assert json.loads(ROWS[0])["messages"][-1]["content"] in text
    assert any("only 6 rows" in warning for warning in out["warnings"])
    tell_examined(telling, out)
    config = final_config(spec, folder, out)
    assert (config.seed, config.train.epochs, config.train.batch_size) == (5, 16.0, 4)
    assert config.data.max_length == 2048 and config.adapter.r == 4 and config.optim.learning_rate == 2e-4
    assert config.checkpoint.every_epochs == 1.0 and config.train.eval_every_epochs == 1.0
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert [event["kind"] for event in events] == ["phase", *["warning"] * len(out["warnings"]), "validated"]
    assert json.loads(folder.resolved.read_text())["plan"] == out["plan"]


@pytest.mark.parametrize(
    ("base", "name"),
    [("models--HuggingFaceTB--SmolLM2-135M/snapshots/0a1b", "HuggingFaceTB/SmolLM2-135M"), ("private/it", "small")],
)
def test_an_adapter_names_its_base_as_others_know_it(tmp_path, base, name):
    spec = JobSpec(**{**make_job(tmp_path, b"")[0].__dict__, "base": str(tmp_path / base)})
    own, taken = tmp_path / "own", tmp_path / "taken"
    for folder in (own, taken):
        folder.mkdir()
    config = {"base_model_name_or_path": spec.base, "r": 4, "peft_type": "LORA"}
    (own / "adapter_config.json").write_text(json.dumps(config))
    (own / "adapter_model.safetensors").write_bytes(b"weights")
    write_sums(own)
    for path in own.iterdir():
        os.link(path, taken / path.name)
    name_base(taken, spec)
    assert json.loads((taken / "adapter_config.json").read_text()) == {**config, "base_model_name_or_path": name}
    assert json.loads((own / "adapter_config.json").read_text()) == config, "the run's own export is a link to it"
    assert check_sums(taken) == check_sums(own) == [] and str(tmp_path) not in (taken / "SHA256SUMS").read_text()
    assert (taken / "adapter_model.safetensors").samefile(own / "adapter_model.safetensors")


def test_the_batch_is_planned_once_for_the_memory_of_the_devices(tmp_path, monkeypatch):
    spec, folder, telling = make_job(tmp_path, ROWS[0], config={"data.max_length": 64})
    config = config_of(spec, folder, resolved={"n_epochs": 1, "learning_rate_multiplier": 1.0, "sequences": 16})

    def parts(spec: JobSpec = spec, limit: int | None = 1) -> int:
        monkeypatch.setattr("jaxft.serving.worker.batch.device_bytes", lambda: limit)
        planned_config = planned(config, spec, folder, telling, steps=4)
        assert planned_config.train.batch_size == 16, "it changes what is learned"
        return planned_config.train.accumulation_steps

    assert parts(limit=None) == 1 and not folder.batch.exists(), "memory that is not known decides nothing"
    most = parts()
    assert most == 16 // jax.device_count() and parts(limit=2**60) == most, "a later worker computes the same bits"
    (event, again) = Watch(folder).new_events()
    assert event == again and event["level"] == "warn" and f"in {most} parts" in event["message"]
    folder.batch.unlink()
    assert parts(limit=2**60) == 1 and json.loads(folder.batch.read_text())["fits"]
    named = JobSpec(**{**spec.__dict__, "config": {"train.accumulation_steps": 4}})
    folder.batch.unlink()
    assert parts(named) == config.train.accumulation_steps and not folder.batch.exists()


def test_configs_of_a_full_tuning_and_of_an_operator(tmp_path):
    spec, folder, _ = make_job(
        tmp_path, ROWS[0], config={"adapter.kind": "none", "checkpoint.every": 5}, overrides=["data.max_length=300"],
        hyperparameters={"learning_rate_multiplier": 0.5},
    )  # fmt: skip
    config = config_of(spec, folder)
    assert config.optim.learning_rate == 1e-5 and config.data.max_length == 300
    assert (config.checkpoint.every, config.checkpoint.every_epochs) == (5, None)
    with pytest.raises(ConfigError, match="quantization"):
        config_of(JobSpec(**{**spec.__dict__, "config": {"adapter.kind": "none", "model.quantization": "nf4"}}), folder)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"", "empty"),
        (b"{", "line 1"),
        (ROWS[0] + b'{"messages": []}\n', "line 2"),
        (ROWS[0] + b"\xff\xfe\n", "UTF-8"),
        (ROWS[0] + b"\x00\n", "line 2"),
        (ROWS[0] + b'{"messages": ' + b"[" * 100_000 + b"\n", "line 2"),
        (ROWS[0].replace(b"\n", b""), None),
        (ROWS[0].replace(b"content\": \"", b"content\": \"" + b"x" * 10**7, 1), "line 1 has 10,000,432 characters"),
    ],
    ids=["none", "no JSON", "no messages", "UTF-16", "zero byte", "deep", "no newline", "10 MB"],
)  # fmt: skip
def test_rows_that_cannot_be_trained_on(tmp_path, rows, message):
    spec, folder, telling = make_job(tmp_path, rows)
    if message is None:
        assert examine(spec, folder, telling)["examination"]["rows"] == 1
        return
    with pytest.raises(DataError) as refused:
        examine(spec, folder, telling)
    error = error_of(refused.value, folder)
    assert (error["code"], error["param"]) == ("invalid_file", "training_file")
    telling.failed(error)
    told = json.loads(folder.outcome.read_text())
    assert message in told["error"]["message"] and str(tmp_path) not in told["error"]["message"]


def test_rows_that_are_all_too_long(tmp_path):
    spec, folder, telling = make_job(
        tmp_path, b"".join(ROWS[:2]), config={"data.max_length": 16, "data.truncation": "drop"}
    )
    with pytest.raises(DataError) as refused:
        examine(spec, folder, telling)
    error = error_of(refused.value, folder)
    assert error["code"] == "invalid_file" and "max_length" in telling.without_paths(error["message"])


def test_errors_and_the_codes_of_jobs(tmp_path):
    _, folder, _ = make_job(tmp_path, ROWS[0])
    try:
        try:
            raise OSError(28, "No space left on device", "/state/x")
        except OSError as cause:
            raise RuntimeError("step 4 was not saved") from cause
    except RuntimeError as error:
        assert error_of(error, folder)["code"] == "insufficient_storage"
    assert error_of(MemoryError(), folder)["code"] == "out_of_memory"
    assert error_of(DataError(f"{folder.validation} line 1"), folder)["param"] == "validation_file"
    assert error_of(ConfigError("x"), folder)["code"] == "invalid_config"
    assert error_of(ValueError("a bug"), folder) is None


def test_a_tail_follows_files_that_grow_and_are_replaced(tmp_path):
    path = tmp_path / "lines"
    tail = Tail(path)
    assert tail.lines() == []
    path.write_bytes(b"one\ntw")
    assert tail.lines() == [b"one"]
    with open(path, "ab") as file:
        file.write(b"o\n")
    assert tail.lines() == [b"two"] and tail.lines() == []
    (tmp_path / "new").write_bytes(b"one\n")
    os.replace(tmp_path / "new", path)
    assert tail.lines() == [b"one"]


def test_a_line_that_was_torn_off_takes_no_other_with_it(tmp_path):
    spec, folder, telling = make_job(tmp_path, b"")
    telling.event("one")
    with open(folder.events, "ab") as file:
        file.write(b'{"kind": "tor' + bytes(9))
    Telling(folder, spec).event("two")
    assert [event["kind"] for event in Watch(folder).new_events()] == ["one", "two"]


def test_a_lock_says_who_lives(tmp_path):
    folder = JobFolder(tmp_path)
    assert not processes.is_alive(folder.lock) and not processes.send(folder.lock, signal.SIGTERM)
    sleeper = [sys.executable, "-S", "-c", "import os, sys, time; time.sleep(60)"]
    process = processes.spawn(folder, "train", sleeper)
    assert processes.is_alive(folder.lock) and processes.spawn(folder, "train", sleeper) is None
    assert not processes.send(folder.lock, signal.SIGTERM)  # it has not said its number yet
    folder.lock.write_text(f"{process.pid}\n")
    assert processes.send(folder.lock, signal.SIGKILL, group=True)
    assert process.wait(60) == -signal.SIGKILL and not processes.is_alive(folder.lock)
    assert not processes.send(folder.lock, signal.SIGTERM), "a process number may be another's by now"


METRICS = [
    {"step": 1, "loss": 2.0, "mean_token_accuracy": 0.5, "learning_rate": 0.1, "step_seconds": 1.0},
    {"step": 2, "loss": 1.0, "mean_token_accuracy": 0.75, "learning_rate": 0.1},
    {"step": 2, "eval_loss": 1.5, "eval_mean_token_accuracy": 0.25},
    {"step": 3, "loss": 0.5, "mean_token_accuracy": 1.0},
]


def test_metrics_under_the_names_of_the_protocol():
    assert step_metrics_csv(METRICS).decode() == (
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,2.0,0.5,,\n2,1.0,0.75,1.5,0.25\n3,0.5,1.0,,\n"
    )
    assert checkpoint_metrics(METRICS, 2) == {
        "step": 2, "train_loss": 1.0, "train_mean_token_accuracy": 0.75, "full_valid_loss": 1.5,
        "full_valid_mean_token_accuracy": 0.25,
    }  # fmt: skip


def test_a_folder_as_a_tar_is_read_by_tar(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "a.bin").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "folder" / "inner" / "empty").touch()
    (tmp_path / "folder" / "link").symlink_to("/etc/passwd")
    (tmp_path / "out.tar").write_bytes(b"".join(tar_pieces(tmp_path / "folder")))
    subprocess.run(["tar", "-xf", tmp_path / "out.tar", "-C", tmp_path], check=True)
    assert (tmp_path / "a.bin").read_bytes() == bytes(range(256)) * 5000
    assert (tmp_path / "inner" / "empty").is_file() and not (tmp_path / "link").exists()
