"""Every command on a run in a bucket, through its real command line; runs with caches, answers and signals there."""

import io
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from bucket_server import serving
from rich.console import Console

import jaxft
from jaxft import cli
from jaxft.assets import ASSETS
from jaxft.errors import ExitCode
from jaxft.runs.export import load_trained
from jaxft.runs.train import train

pytestmark = pytest.mark.slow  # whole runs, some minutes in all

SMOKE_ROWS = ASSETS / "smoke"
SETTINGS = {"eval.metric": None, "checkpoint.every": 2, "export.merged": False}
RUN = "gs://bucket/runs/one"
PAIRS = {
    "adapter.dropout": 0.0, "data.train": SMOKE_ROWS / "pairs.jsonl", "data.eval": SMOKE_ROWS / "pairs_heldout.jsonl",
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


def trained(address, **settings) -> str:
    """Trains, and returns what the console shows."""
    out = io.StringIO()
    given = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    config = jaxft.get_config("configs/quickstart.py:smoke", {**SETTINGS, "output_dir": address, **given})
    train(config, console=Console(file=out, width=200))
    return out.getvalue()


@pytest.fixture(scope="module")
def run(server):
    trained(RUN, **{"export.merged": True})
    return RUN


@pytest.fixture(autouse=True)
def nothing_is_written(request, server):
    """Commands that read a run leave its bucket as it was."""
    if "run" not in request.fixturenames:
        yield
        return
    request.getfixturevalue("run")
    before = {name: server.read("bucket", name) for name in server.names("bucket")}
    yield
    assert {name: server.read("bucket", name) for name in server.names("bucket")} == before


TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) + 40


def test_exports_in_the_bucket_are_the_model_of_the_checkpoint(run):
    """By their logits; the merged model differs by the rounding of the merge alone."""
    expected = load_trained(run, step=4).logits(TOKENS)
    adapter, merged = (jaxft.load_model(f"{run}/{name}") for name in ("adapter", "merged"))
    np.testing.assert_array_equal(adapter.logits(TOKENS), expected)
    np.testing.assert_allclose(merged.logits(TOKENS), expected, atol=1e-6 * np.abs(expected).max())
    other = load_trained(run, step=2).logits(TOKENS)
    assert np.abs(other - expected).max() > 1e-4 * np.abs(expected).max()  # another step is another model


def test_exporting_from_the_bucket_gives_the_model_of_the_step(run, tmp_path):
    for form in ("adapter", "merged"):
        arguments = [f"--run={run}", "--step=2", f"--to={tmp_path / form}", f"--format={form}"]
        assert cli.main(["export", *arguments]) == 0
        expected = load_trained(run, step=2).logits(TOKENS)
        logits = jaxft.load_model(str(tmp_path / form)).logits(TOKENS)
        np.testing.assert_allclose(logits, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("path", ["", "/adapter", "/merged"])
def test_generate_answers_from_the_bucket(run, capsys, path):
    arguments = [f"--model={run}{path}", "--prompt=Where is my parcel?", "--max_new_tokens=6", "--temperature=0"]
    assert cli.main(["generate", *arguments, "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    module, tokenizer = load_trained(run), jaxft.load_tokenizer(f"{run}/adapter")
    expected = jaxft.generate(module, tokenizer, ["Where is my parcel?"], max_new_tokens=6, temperature=0.0)
    assert [answer] == expected


def test_chat_answers_from_the_bucket(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Where is my parcel?\n"))
    assert cli.main(["chat", f"--model={run}", "--max_new_tokens=4", "--json"]) == 0
    messages = json.loads(capsys.readouterr().out)["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant"]


def test_runs_and_verify_read_the_bucket(run, capsys):
    assert cli.main(["runs", "gs://bucket/runs", "--json"]) == 0
    (state,) = json.loads(capsys.readouterr().out)["runs"]
    assert (state["folder"], state["state"], state["step"]) == (run, "finished", 4)
    assert cli.main(["verify", run, "--no_rows"]) == 0
    assert "jaxft-run-" not in capsys.readouterr().out


def test_verify_names_what_is_damaged_by_its_address(run, server, capsys):
    name = "runs/one/adapter/adapter_model.safetensors"
    whole = server.read("bucket", name)
    server.write("bucket", name, whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert cli.main(["verify", run, "--no_rows"]) == ExitCode.REFUSED
        printed = capsys.readouterr()
    finally:
        server.write("bucket", name, whole)
    assert "adapter_model.safetensors" in printed.out and "jaxft-run-" not in printed.out + printed.err


def test_score_reads_a_reward_model_in_the_bucket(server, capsys):
    trained("gs://bucket/judge", **PAIRS, **{"method.name": "reward", "train.steps": 2})
    arguments = [f"--data={SMOKE_ROWS / 'pairs_heldout.jsonl'}", "--json"]
    assert cli.main(["score", "--model=gs://bucket/judge", *arguments]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert cli.main(["score", "--model=gs://bucket/judge/adapter", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == scores


# -- caches, answers and signals -----------------------------------------------------------------


def test_a_cached_reference_is_computed_once(server):
    more = {**PAIRS, "method.name": "dpo", "method.dpo.reference": "cached"}
    assert "reference log-probabilities of" in trained("gs://bucket/dpo", **more, **{"train.steps": 2})
    kept = server.read("bucket", "dpo/reference.npz")
    assert "reference log-probabilities of" not in trained("gs://bucket/dpo", **more, **{"train.steps": 4})
    assert server.read("bucket", "dpo/reference.npz") == kept


def test_a_cached_teacher_is_computed_once(server, run):
    more = {"method.name": "distill", "method.distill.teacher": f"{run}/merged", "method.distill.cache_top_k": 8}
    said = trained("gs://bucket/student", **more, **{"train.steps": 2})
    assert "the teacher's log-probabilities of" in said
    kept = [name for name in server.names("bucket", "student/teacher/")]
    assert len(kept) == 4
    assert "the teacher's" not in trained("gs://bucket/student", **more, **{"train.steps": 4})
    assert [name for name in server.names("bucket", "student/teacher/")] == kept
    for name in server.names("bucket", "student/"):
        server.delete("bucket", name)


def test_answers_are_kept_in_the_bucket_and_go_on_there(server):
    more = {
        "method.name": "grpo", "adapter.dropout": 0.0, "data.train": SMOKE_ROWS / "prompts.jsonl",
        "data.eval": SMOKE_ROWS / "prompts_heldout.jsonl", "rollout.num_generations": 4,
        "rollout.max_completion_length": 8, "rewards.workers": 1, "train.batch_size": 16,
        "rewards.functions": f"{Path(__file__).parents[1] / 'rollouts' / 'reward_cases.py'}:odd",
    }  # fmt: skip
    steps = []
    for count in (2, 4):
        trained("gs://bucket/answers", **more, **{"train.steps": count})
        lines = server.read("bucket", "answers/completions.jsonl").decode().splitlines()
        steps.append(sorted({json.loads(line)["step"] for line in lines}))
    assert steps == [[1, 2], [1, 2, 3, 4]]


def test_a_signal_saves_in_the_bucket_and_the_same_command_goes_on(server):
    settings = {**SETTINGS, "output_dir": "gs://bucket/stopped", "train.steps": 400, "checkpoint.every": None}
    command = [
        sys.executable, "-m", "jaxft.cli", "train", "--config=configs/quickstart.py:smoke",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch = threading.Timer(600, process.kill)  # a run that hangs fails, and keeps nobody waiting
    watch.start()
    try:
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
                break
        said = process.communicate()[0]
    finally:
        watch.cancel()
        process.kill()
    assert process.returncode == ExitCode.PREEMPTED, said
    whole = [name for name in server.names("bucket", "stopped/checkpoints/") if name.endswith("manifest.json")]
    (step,) = (int(name.split("/")[2]) for name in whole)
    rows = [json.loads(line) for line in server.read("bucket", "stopped/metrics.jsonl").decode().splitlines()]
    assert rows[-1]["step"] == step  # no logged row of a step that is whole is lost
    assert "stopped/jaxft_lock.json" not in server.names("bucket", "stopped/")
    more = {**settings, "train.steps": step + 2}
    assert f"going on from step {step} of {step + 2}" in trained(
        more.pop("output_dir"), **{name: value for name, value in more.items()}
    )
