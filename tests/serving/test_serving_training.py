"""Jobs with the real worker, on a tiny model: one run of it; the dear ones are slow."""

import csv
import io
import json
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai._legacy_response import HttpxBinaryResponseContent
from servers import MODEL, ServerProcess, messages, until, upload, wait_for, write_model

from jaxft.assets import ASSETS
from jaxft.checkpoint.folders.sums import check_sums

WORKER = "jaxft.serving.worker"
TRAIN = (ASSETS / "quickstart" / "train.jsonl").read_bytes().splitlines(keepends=True)
HELD_OUT = (ASSETS / "quickstart" / "heldout.jsonl").read_bytes().splitlines(keepends=True)
NUMBERS = {"n_epochs": 3, "batch_size": 2}
CONFIG = {"adapter.r": 4, "adapter.dropout": 0.1, "data.max_length": 400, "data.packing": False}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("training")
    server = ServerProcess(folder / "state", write_model(folder / "model"), WORKER)
    yield server
    assert server.end(signal.SIGTERM) == 0, "the server imported JAX, or failed"


@pytest.fixture(scope="module")
def client(process: ServerProcess) -> openai.OpenAI:
    return process.running.client()


def create(client: openai.OpenAI, rows: int = 8, **settings: Any) -> Any:
    file = upload(client, b"".join(TRAIN[:rows]))
    ours = {"jaxft": {"config": CONFIG | settings.pop("config", {})}}
    numbers = settings.pop("numbers", NUMBERS)
    return client.fine_tuning.jobs.create(
        model=MODEL, training_file=file, seed=3, hyperparameters=numbers, extra_body=ours, **settings
    )


def weights(client: openai.OpenAI, job: Any) -> bytes:
    """The file of the adapter of a job's model."""
    step = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].step_number
    path = f"/jaxft/jobs/{job.id}/artifacts/step-{step}.tar"
    with tarfile.open(fileobj=io.BytesIO(client.get(path, cast_to=HttpxBinaryResponseContent).content)) as archive:
        return archive.extractfile("adapter_model.safetensors").read()


@pytest.mark.slow
def test_a_job_trains_and_its_checkpoints_are_adapters(client, process):
    job = until(client, create(client, 4, numbers={"n_epochs": 2, "batch_size": 2}).id, "succeeded")
    examination = job.jaxft["examination"]
    assert examination["rows"] == 4 and any(piece["trained"] for piece in examination["first_rows"][0])
    assert job.jaxft["plan"]["steps"] == 4 and job.trained_tokens == 2 * examination["tokens"]
    points = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [one.step_number for one in points] == [4, 2] and all(one.metrics.train_loss > 0 for one in points)
    folders = [process.state / "models" / f"{job.id}-{name}" for name in ("final", 2)]
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert len(set(adapters)) == 2 and json.loads((folders[1] / "adapter_config.json").read_text())["r"] == 4
    assert table_of(client, job).keys() == {"1", "2", "3", "4"}
    assert client.get("/jaxft/system", cast_to=object)["devices"]["platform"] == "cpu"
    assert not [text for text in messages(client, job.id) if str(process.state) in text]
    for folder in folders:
        assert check_sums(folder) == [] and adapter_base(folder) == MODEL
        texts = [path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".md", ".jinja", "")]
        assert not [text for text in texts if str(process.state.parent) in text], "a path of the server"


def adapter_base(folder: Path) -> str:
    return str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


def table_of(client: openai.OpenAI, job: Any) -> dict[str, dict[str, str]]:
    """The rows of a job's first result file by step."""
    text = client.files.content(job.result_files[0]).text
    return {row["step"]: row for row in csv.DictReader(io.StringIO(text))}


@pytest.mark.slow
def test_held_out_rows_are_evaluated_at_the_end_of_every_epoch(client):
    held_out = upload(client, b"".join(HELD_OUT[:2]))
    job = until(client, create(client, validation_file=held_out).id, "succeeded")
    assert job.jaxft["examination"]["validation"]["rows"] == 2 and job.jaxft["plan"]["steps"] == 12
    points = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [one.step_number for one in points] == [12, 8, 4]
    assert all(one.metrics.full_valid_loss > 0 and one.metrics.train_loss > 0 for one in points)
    table = table_of(client, job)
    assert list(table) == [str(step) for step in range(1, 13)]
    assert {step for step, row in table.items() if row["valid_loss"]} == {"4", "8", "12"}


@pytest.mark.slow
def test_stopped_and_killed_jobs_end_like_an_uninterrupted_one(client, process, tmp_path):
    whole = weights(client, until(client, create(client).id, "succeeded"))
    # Paused in the middle of an epoch, and resumed.
    job = create(client)
    wait_for(lambda: (client.fine_tuning.jobs.retrieve(job.id).jaxft["progress"] or {}).get("step", 0) >= 2, "step 2")
    client.fine_tuning.jobs.pause(job.id)
    until(client, job.id, "paused")
    client.fine_tuning.jobs.resume(job.id)
    assert weights(client, until(client, job.id, "succeeded")) == whole
    # The worker is killed after its first checkpoint.
    job = create(client)
    lock = process.state / "jobs" / job.id / "lock"
    wait_for(lambda: client.fine_tuning.jobs.checkpoints.list(job.id).data, "a checkpoint")
    kill(lock)
    job = until(client, job.id, "succeeded")
    assert weights(client, job) == whole and any("died by signal 9" in text for text in messages(client, job.id))
    numbers = [text for text in messages(client, job.id) if text.startswith("Step")]
    assert len(numbers) == len(set(numbers)) == 12


def kill(lock: Path) -> None:
    import os

    os.kill(int(lock.read_text()), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_server_leaves_its_job_to_the_next_one(tmp_path):
    model = write_model(tmp_path / "model")
    first = ServerProcess(tmp_path / "state", model, WORKER)
    client = first.running.client()
    whole = weights(client, until(client, create(client).id, "succeeded"))
    job = create(client)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).jaxft["progress"], "a step")
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    second = ServerProcess(tmp_path / "state", model, WORKER)
    client = second.running.client()
    job = until(client, job.id, "succeeded")
    assert weights(client, job) == whole and job.jaxft["deaths"] == 0
    # Both are killed.
    job = create(client)
    wait_for(lambda: client.fine_tuning.jobs.checkpoints.list(job.id).data, "a checkpoint")
    assert second.end(signal.SIGKILL) == -signal.SIGKILL
    kill(tmp_path / "state" / "jobs" / job.id / "lock")
    third = ServerProcess(tmp_path / "state", model, WORKER)
    client = third.running.client()
    assert weights(client, until(client, job.id, "succeeded")) == whole
    # SIGTERM: the worker saves, and the job goes on at the next start.
    job = create(client)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).jaxft["progress"], "a step")
    assert third.end(signal.SIGTERM) == 0
    fourth = ServerProcess(tmp_path / "state", model, WORKER)
    client = fourth.running.client()
    assert weights(client, until(client, job.id, "succeeded")) == whole
    assert fourth.end(signal.SIGTERM) == 0


@pytest.mark.slow
def test_a_full_fine_tuning_gives_whole_models(client, process):
    job = until(
        client, create(client, config={"adapter.kind": "none", "adapter.r": 16, "adapter.dropout": 0.0}).id, "succeeded"
    )
    assert client.models.retrieve(job.fine_tuned_model).jaxft["kind"] == "full"
    assert (process.state / "models" / f"{job.id}-4" / "model.safetensors").is_file()
