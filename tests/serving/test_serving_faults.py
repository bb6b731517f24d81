"""Faults that no other file here provokes: requests in every state, full disks, a crowd of clients."""

import asyncio
import errno
import itertools
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from answering import Served, serving
from servers import MODEL, create, in_thread, rows, until

from jaxft.assets import ASSETS
from jaxft.errors import CheckpointError, ExitCode
from jaxft.files.atomic import write_file
from jaxft.serving.http.errors import ApiError
from jaxft.serving.jobs.folder import JobFolder, JobSpec
from jaxft.serving.jobs.request import parse_job
from jaxft.serving.storage.files import NewFile, add_file, new_file_id
from jaxft.serving.storage.jobs import (
    add_job,
    cancel_job,
    job_folder,
    job_of,
    new_job_id,
    pause_job,
    resume_job,
    set_columns,
)
from jaxft.serving.storage.keys import add_key
from jaxft.serving.storage.state import State, open_state
from jaxft.serving.worker import __main__ as worker

SMOKE = str(ASSETS / "smoke")
ROW = (ASSETS / "quickstart" / "train.jsonl").read_bytes().splitlines(keepends=True)[0]
UNFINISHED = ("validating_files", "queued", "running", "pausing", "paused")
ALLOWED = {
    cancel_job: dict.fromkeys(UNFINISHED, "cancelled"),
    pause_job: {"running": "pausing", "queued": "paused"},
    resume_job: {"paused": "queued"},
}


def new_job(state: State) -> str:
    file = NewFile(id=new_file_id(), filename="a", bytes=len(ROW), purpose="fine-tune", sha256="")
    (state.files / file.id).write_bytes(ROW)
    add_file(state, file)
    request = parse_job({"model": MODEL, "training_file": file.id})
    spec = JobSpec(id=new_job_id(), name=MODEL, base=SMOKE, seed=1, context=4096, hyperparameters={}, config={})
    return str(add_job(state, request, spec, key_id="k", hash="h", idempotency=None)["id"])


def test_every_request_in_every_state(tmp_path):
    """One of the states of the table follows, or the request is refused, names the state and changes nothing."""
    with open_state(tmp_path / "state") as state:
        id = new_job(state)
        for status, (call, allowed) in itertools.product(
            (*UNFINISHED, "succeeded", "failed", "cancelled"), ALLOWED.items()
        ):
            set_columns(state, id, status=status)
            if status in allowed:
                assert call(state, id)["status"] == job_of(state, id)["status"] == allowed[status]
                continue
            before = len(state.db.all("SELECT * FROM events"))
            with pytest.raises(ApiError, match=f"The job is {status}") as refused:
                call(state, id)
            assert (refused.value.status, refused.value.code) == (400, "invalid_job_state")
            assert job_of(state, id)["status"] == status and len(state.db.all("SELECT * FROM events")) == before


def test_requests_in_any_order_end_in_a_state_of_the_table(tmp_path):
    with open_state(tmp_path / "state") as state:
        for order in itertools.permutations((pause_job, resume_job, cancel_job, pause_job), 3):
            id, status = new_job(state), "queued"
            set_columns(state, id, status=status)
            for call in order:
                if (after := ALLOWED[call].get(status)) is None:
                    with pytest.raises(ApiError):
                        call(state, id)
                else:
                    assert call(state, id)["status"] == after
                    status = after
            assert job_of(state, id)["status"] == status


def test_a_disk_that_is_full_at_a_checkpoint_fails_the_job_with_the_reason(tmp_path, monkeypatch):
    with open_state(tmp_path / "state") as state:
        folder: JobFolder = job_folder(state, new_job(state))

    def train(*arguments: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder.run / "checkpoints" / "4"))
        except OSError as error:
            raise CheckpointError(f"step 4 was not saved to {folder.run}") from error

    monkeypatch.setattr("jaxft.serving.worker.training.train_job", train)
    lock = os.open(folder.lock, os.O_RDWR | os.O_CREAT)
    monkeypatch.setattr(sys, "argv", ["worker", str(folder.path), "--goal=train", f"--lock={lock}"])
    assert worker.main() == ExitCode.REFUSED
    os.close(lock)
    outcome = json.loads(folder.outcome.read_text())
    assert outcome["state"] == "failed" and outcome["error"]["code"] == "insufficient_storage"
    assert str(tmp_path) not in outcome["error"]["message"]


def test_a_disk_that_is_full_at_the_end_of_a_job_delays_it_and_leaves_no_halves(tmp_path, monkeypatch):
    calls = itertools.count()

    def write(path: Any, fill: Any) -> None:
        if next(calls) in (0, 2, 3):  # the first file, then the second, then the first again
            raise OSError(errno.ENOSPC, "No space left on device")
        write_file(path, fill)

    monkeypatch.setattr("jaxft.serving.supervision.ending.write_file", write)
    with in_thread(tmp_path / "state", SMOKE) as running:
        client = running.client()
        job = until(client, create(client, rows()).id, "succeeded")
        assert next(calls) == 6 and client.files.content(job.result_files[1]).text.count("\n") == 4
        assert {path.name for path in (running.state / "files").iterdir()} == {file.id for file in client.files.list()}


@pytest.mark.slow
def test_two_hundred_requests_on_eight_slots(tmp_path):
    """Those beyond the bound are refused, all others answered right, and the memory stays as it is."""
    with serving(tmp_path, slots=8, queue=64) as running:
        served, sizes = Served(running, tmp_path), []
        with open_state(running.state, exclusive=False) as state:
            keys = [add_key(state.db, str(number), ["answer"]) for number in range(5)]
        served.chat()
        # In a process of their own: this one has the server, whose memory is looked at.
        clients = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        for _ in range(4):
            results = clients.submit(ask_at_once, running.url, keys, tmp_path).result()
            texts = [one for one in results if isinstance(one, str)]
            assert len(texts) == 72 and all(one in (429, *texts) for one in results)
            assert {int(text.split()[1]) for text in texts} == {
                number for number, one in enumerate(results) if isinstance(one, str)
            }
            assert served.engine()["open"] == 0
            sizes.append(served.client.get("/jaxft/system", cast_to=object)["server_bytes"])
        clients.shutdown()
        assert sizes[-1] - sizes[0] < 16 * 2**20, sizes


def ask_at_once(url: str, keys: list[str], folder: Path) -> list[str | int]:
    """What 200 requests of five keys get: the text of the answer, or the status of the error."""
    return asyncio.run(crowd(url, keys, folder))


async def crowd(url: str, keys: list[str], folder: Path) -> list[str | int]:
    clients = [openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) for key in keys]

    async def ask(number: int) -> str | int:
        todo = {"pieces": ["answer ", str(number)], "wait": True}
        messages = [{"role": "user", "content": json.dumps(todo)}]
        try:
            answer = await clients[number % 5].chat.completions.create(model=MODEL, messages=messages)
        except openai.APIStatusError as error:
            return error.status_code
        return str(answer.choices[0].message.content)

    calls = [asyncio.create_task(ask(number)) for number in range(200)]
    while sum(call.done() for call in calls) < 128:
        await asyncio.sleep(0.01)
    (folder / "go").touch()
    results = await asyncio.gather(*calls)
    (folder / "go").unlink()
    for client in clients:
        await client.close()
    return list(results)
