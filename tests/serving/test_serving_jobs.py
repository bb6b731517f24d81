"""Jobs over the protocol: their states, events, checkpoints and results, with a stand-in for workers."""

import concurrent.futures
import csv
import io
import itertools
import json
import tarfile
import urllib.request

import openai
import pytest
from openai._legacy_response import HttpxBinaryResponseContent
from servers import MODEL, create, messages, rows, until, upload, wait_for


def test_a_job_from_file_to_model(client):
    job = create(client, rows(steps=6, epoch=2), suffix="mine", seed=7, metadata={"who": "me"})
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "validating_files", MODEL, 7)
    assert job.hyperparameters.n_epochs == "auto" and job.method.type == "supervised" and job.result_files == []
    job = until(client, job.id, "succeeded")
    assert job.fine_tuned_model.startswith(f"ft:{MODEL}:jaxft:mine:") and job.trained_tokens == 6
    assert job.hyperparameters.n_epochs == 3 and job.finished_at >= job.created_at and job.error is None
    assert job.jaxft["examination"] == {"rows": 1} and job.jaxft["progress"]["step"] == 6
    said = messages(client, job.id)
    assert said[:5] == [
        f"Created fine-tuning job: {job.id}", f"Validating training file: {job.training_file}", "Files validated",
        "Files validated, moving job to queued state", "Fine-tuning job started",
    ]  # fmt: skip
    assert said[-1] == "The job has successfully completed"
    assert said[-2] == f"New fine-tuned model created: {job.fine_tuned_model}"
    assert [text for text in said if text.startswith("Step")] == [
        f"Step {step}/6: training loss={1 / step:.4f}" for step in range(1, 7)
    ]
    points = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [(one.step_number, one.fine_tuned_model_checkpoint) for one in points] == [
        (6, job.fine_tuned_model),
        (4, f"{job.fine_tuned_model}:ckpt-step-4"),
        (2, f"{job.fine_tuned_model}:ckpt-step-2"),
    ]
    assert points[1].metrics.train_loss == 0.25 and points[1].metrics.step == 4


def test_what_a_job_leaves(client):
    job = until(client, create(client, rows(steps=3)).id, "succeeded")
    text = client.files.content(job.result_files[0]).text
    table = list(csv.DictReader(io.StringIO(text)))
    assert [row["step"] for row in table] == ["1", "2", "3"] and float(table[1]["train_loss"]) == 0.5
    assert client.files.retrieve(job.result_files[0]).purpose == "fine-tune-results"
    lines = client.files.content(job.result_files[1]).text.splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    part = client.get(f"/jaxft/jobs/{job.id}/metrics?after=1", cast_to=object)
    assert [row["step"] for row in part["data"]] == [2, 3] and not part["has_more"]
    assert job.jaxft["artifacts"] == ["step-3.tar", "worker.log"]
    packed = client.get(f"/jaxft/jobs/{job.id}/artifacts/step-3.tar", cast_to=HttpxBinaryResponseContent).content
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert json.load(archive.extractfile("adapter_config.json")) == {"step": 3}
    for name in ("step-9.tar", "..%2f..%2fstate.sqlite3", "job.json"):
        with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
            client.get(f"/jaxft/jobs/{job.id}/artifacts/{name}", cast_to=object)


def test_three_checkpoints_are_kept_and_a_deleted_model_is_gone(client, server):
    job = until(client, create(client, rows(steps=10, epoch=2)).id, "succeeded")
    steps = [one.step_number for one in client.fine_tuning.jobs.checkpoints.list(job.id)]
    assert steps == [10, 8, 6]
    assert len(list((server.state / "models").glob(f"{job.id}-*"))) == 3
    assert client.models.retrieve(job.fine_tuned_model).owned_by == "jaxft"
    assert client.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError, match="There is no model"):
        client.models.retrieve(job.fine_tuned_model)
    assert job.fine_tuned_model not in [one.id for one in client.models.list()]
    assert not (server.state / "models" / f"{job.id}-final").exists()


def test_rows_that_are_refused(client):
    job = until(client, create(client, rows(bad="line 1: is no conversation")).id, "failed")
    assert (job.error.code, job.error.param) == ("invalid_file", "training_file")
    assert job.error.message == "line 1: is no conversation" and job.finished_at
    assert messages(client, job.id)[-1] == f"The job failed: {job.error.message}"


def test_a_job_that_fails_in_training_keeps_its_checkpoints(client):
    job = until(client, create(client, rows(epoch=2, fail="loss is not finite")).id, "failed")
    assert job.error.code == "diverged" and job.fine_tuned_model is None
    assert [one.step_number for one in client.fine_tuning.jobs.checkpoints.list(job.id)] == [2]


def test_a_job_that_is_not_to_start_waits_examined(client):
    job = create(client, rows(), extra_body={"jaxft": {"start": False}})
    job = until(client, job.id, "paused")
    assert job.jaxft["plan"] == {"steps": 4} and job.hyperparameters.batch_size == 2
    assert not [text for text in messages(client, job.id) if "started" in text]
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    until(client, job.id, "succeeded")


def test_pause_and_resume(client):
    job = create(client, rows(steps=9, wait=5))
    wait_for(lambda: (client.fine_tuning.jobs.retrieve(job.id).jaxft["progress"] or {}).get("step") == 5, "step 5")
    assert client.fine_tuning.jobs.pause(job.id).status == "pausing"
    job = until(client, job.id, "paused")
    assert "Job paused at step 5, which is saved" in messages(client, job.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.pause(job.id)
    assert refused.value.code == "invalid_job_state" and "The job is paused" in str(refused.value)
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    job = until(client, job.id, "succeeded")
    numbers = [text for text in messages(client, job.id) if text.startswith("Step")]
    assert len(numbers) == len(set(numbers)) == 9


def test_cancel_in_every_state(client, server):
    running = create(client, rows(steps=4, wait=3, epoch=2))
    wait_for(lambda: client.fine_tuning.jobs.checkpoints.list(running.id).data, "a checkpoint")
    waiting = create(client, rows())
    until(client, waiting.id, "queued")
    paused = create(client, rows())
    until(client, paused.id, "queued")
    assert client.fine_tuning.jobs.pause(paused.id).status == "paused"
    for job in (waiting, paused, running):
        cancelled = client.fine_tuning.jobs.cancel(job.id)
        assert cancelled.status == "cancelled" and cancelled.finished_at
        for call in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
            with pytest.raises(openai.BadRequestError, match="The job is cancelled"):
                call(job.id)
    # The devices are free when the worker has gone: the next job runs.
    until(client, create(client, rows()).id, "succeeded")
    assert client.fine_tuning.jobs.retrieve(running.id).status == "cancelled"
    assert client.fine_tuning.jobs.checkpoints.list(running.id).data, "what was made so far stays"
    wait_for(lambda: not (server.state / "jobs" / running.id / "run" / "checkpoints").exists(), "the cleaning")


def test_a_worker_that_does_not_listen_is_ended(client):
    job = create(client, rows(steps=2000, pause=0.05, deaf=True))
    until(client, job.id, "running")
    client.fine_tuning.jobs.cancel(job.id)
    until(client, create(client, rows()).id, "succeeded")


def test_a_worker_that_dies_goes_on_from_its_newest_checkpoint(client):
    job = until(client, create(client, rows(steps=6, epoch=2, die=[0, 3, 5])).id, "succeeded")
    said = messages(client, job.id)
    assert sum("died by signal 9" in text for text in said) == 3 and job.jaxft["deaths"] == 1
    assert said.count("Files validated") == said.count("Fine-tuning job started") == 1
    assert [text for text in said if text.startswith("Step")] == [
        f"Step {step}/6: training loss={1 / step:.4f}" for step in range(1, 7)
    ]


def test_a_worker_that_always_dies_is_given_up(client):
    job = until(client, create(client, rows(die=[2], always_die=True)).id, "failed")
    assert job.error.code == "worker_died" and "3 times without a new checkpoint" in job.error.message


def test_one_job_trains_at_a_time_in_order(client):
    first = create(client, rows(wait=1))
    until(client, first.id, "running")
    second, third = (create(client, rows(steps=2)) for _ in range(2))
    for job in (second, third):
        until(client, job.id, "queued")
    client.fine_tuning.jobs.cancel(first.id)
    until(client, third.id, "running", "succeeded")
    assert client.fine_tuning.jobs.retrieve(second.id).status == "succeeded"
    until(client, third.id, "succeeded")


def test_a_repeated_request_creates_no_second_job(client):
    file = upload(client, rows())
    before = len(client.fine_tuning.jobs.list(limit=100).data)

    def request(**headers):
        return client.fine_tuning.jobs.create(model=MODEL, training_file=file, seed=1, extra_headers=headers).id

    first = request()
    assert request(**{"x-stainless-retry-count": "1"}) == first != request()
    keyed = request(**{"Idempotency-Key": "a"})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: request(**{"Idempotency-Key": "a"}), range(4))) == {keyed}
    with pytest.raises(openai.BadRequestError, match="was used for another request"):
        client.fine_tuning.jobs.create(model=MODEL, training_file=file, extra_headers={"Idempotency-Key": "a"})
    after = client.fine_tuning.jobs.list(limit=100).data
    assert len(after) == before + 3
    for job in after:
        if job.status not in ("succeeded", "failed", "cancelled"):
            until(client, job.id, "succeeded")


def test_jobs_are_listed_by_pages_and_metadata(client, monkeypatch):
    file, clock = upload(client, rows()), itertools.count(10**9, -100)
    monkeypatch.setattr("jaxft.serving.storage.jobs.now", lambda: next(clock))  # set back: the order stays
    made = [
        client.fine_tuning.jobs.create(
            model=MODEL, training_file=file, metadata={"set": "pages", "n": str(n % 2)}, seed=n,
            extra_body={"jaxft": {"start": False}},
        ).id
        for n in range(5)
    ]  # fmt: skip
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2, metadata={"set": "pages"})] == made[::-1]
    odd = client.fine_tuning.jobs.list(metadata={"set": "pages", "n": "1"})
    assert [job.id for job in odd] == [made[3], made[1]]
    assert client.fine_tuning.jobs.list(metadata={"set": "none"}).data == []
    for wrong in ({"after": "ftjob-none"}, {"limit": 0}, {"limit": 101}):
        with pytest.raises(openai.BadRequestError):
            client.fine_tuning.jobs.list(**wrong)
    for id in made:
        until(client, id, "paused")
        client.fine_tuning.jobs.cancel(id)


def test_a_deleted_file_does_not_disturb_its_job(client):
    file = upload(client, rows(steps=30, pause=0.02))
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file)
    client.files.delete(file)
    assert until(client, job.id, "succeeded").training_file == file
    with pytest.raises(openai.NotFoundError, match="There is no file"):
        client.fine_tuning.jobs.create(model=MODEL, training_file=file)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "tiny2"}, "Did you mean 'tiny'"),
        ({"training_file": "file-none"}, "There is no file"),
        ({"suffix": "a b"}, "suffix must be"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata may have 16 pairs"),
        ({"metadata": {"k": "v" * 513}}, "at most 512"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs must be a whole number from 1 to 50"),
        ({"hyperparameters": {"batch_size": 0}}, "batch_size must be"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "above 0"),
        ({"method": {"type": "dpo", "dpo": {}}}, "'dpo' is not served yet"),
        ({"method": {"type": "reinforcement"}}, "'reinforcement' is not served yet"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations are not served yet"),
        ({"extra_body": {"sufix": "x"}}, "Did you mean 'suffix'"),
        ({"extra_body": {"jaxft": {"config": {"adapter.rr": 4}}}}, "Did you mean 'adapter.r'"),
        ({"extra_body": {"jaxft": {"config": {"adapter.r": "many"}}}}, "adapter.r"),
        ({"extra_body": {"jaxft": {"config": {"data.train": "/etc/passwd"}}}}, "set by training_file of the job"),
        ({"extra_body": {"jaxft": {"config": {"data.chat_template": "/etc/passwd"}}}}, "is no setting of a job"),
        ({"extra_body": {"jaxft": {"config": {"model.tokenizer": "/etc"}}}}, "is no setting of a job"),
        ({"extra_body": {"jaxft": {"start": "no"}}}, "true or false"),
    ],
)
def test_requests_that_are_refused(client, wrong, message):
    good = {"model": MODEL, "training_file": "file-none"}
    if "training_file" not in wrong:
        good["training_file"] = upload(client, rows())
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refused:
        client.fine_tuning.jobs.create(**good | wrong)
    assert message in refused.value.message


def test_two_forms_of_hyperparameters(client):
    numbers = {"n_epochs": 2, "learning_rate_multiplier": 0.5}
    waits = {"jaxft": {"start": False, "config": {"adapter.r": 4}}}
    method = {"type": "supervised", "supervised": {"hyperparameters": numbers}}
    for form in ({"hyperparameters": numbers}, {"method": method}):
        job = create(client, rows(), extra_body=waits, **form)
        assert job.hyperparameters.n_epochs == 2 and job.hyperparameters.batch_size == "auto"
        assert job.jaxft["config"] == {"adapter.r": 4}
    with pytest.raises(openai.BadRequestError, match="differ: give one"):
        create(client, rows(), hyperparameters={"n_epochs": 3}, method=method)


def test_live_changes_reach_a_stream_and_are_replayed(client, server):
    job = until(client, create(client, rows(steps=3)).id, "succeeded")
    headers = {"Last-Event-ID": "0"}
    seen, ids = [], []
    with urllib.request.urlopen(
        urllib.request.Request(
            f"{server.url}/jaxft/stream", headers=headers | {"Authorization": f"Bearer {server.key}"}
        )
    ) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in map(bytes.decode, stream):
            if line.startswith("id: "):
                ids.append(int(line[4:]))
            if line.startswith("data: "):
                seen.append(json.loads(line[6:]))
                if seen[-1]["object"] == "fine_tuning.job" and seen[-1]["id"] == job.id:
                    break
    assert ids == sorted(set(ids)) and ids[0] == 1
    told = [one["message"] for one in seen if one.get("job_id") == job.id]
    assert told == messages(client, job.id) and seen[-1]["status"] == "succeeded"
