"""Jobs and the changes of their states, each one conditional UPDATE."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jaxft.files.atomic import flush
from jaxft.serving.http.errors import bad_request, disk_error, no_such
from jaxft.serving.jobs.folder import JobFolder, JobSpec
from jaxft.serving.jobs.request import JobRequest
from jaxft.serving.storage.database import Row
from jaxft.serving.storage.events import NewEvent, add_event
from jaxft.serving.storage.files import file_of, link_file
from jaxft.serving.storage.state import State, new_id, now

ENDED = ("succeeded", "failed", "cancelled")
UNFINISHED = ("validating_files", "queued", "running", "pausing", "paused")
REPEATED_SECONDS = 600  # in which a client repeats a request that got no answer
TAG = 8  # characters that make the name of a model its job's alone


def job_folder(state: State, id: str) -> JobFolder:
    """The folder of a job."""
    return JobFolder(state.jobs / id)


def job_of(state: State, id: str) -> Row:
    """The row of a job. Raises ApiError 404."""
    row = state.db.one("SELECT * FROM jobs WHERE id = ?", (id,))
    if row is None:
        raise no_such("fine-tuning job", id, "fine_tuning_job_not_found")
    return row


def jobs_in(state: State, *statuses: str) -> list[Row]:
    """The jobs in one of the states, oldest first."""
    marks = ", ".join("?" * len(statuses))
    return state.db.all(f"SELECT * FROM jobs WHERE status IN ({marks}) ORDER BY n", statuses)


def repeated(state: State, key_id: str, request_hash: str, idempotency_key: str | None, retry: bool) -> Row | None:
    """The job that the same request has created before; None if it has not.

    retry: whether the client says that it repeats itself. Raises ApiError 400 for an idempotency key that was used for
    another request.
    """
    if idempotency_key is not None:
        sql = "SELECT * FROM jobs WHERE key_id = ? AND idempotency_key = ?"
        row = state.db.one(sql, (key_id, idempotency_key))
        if row is not None and row["request_hash"] != request_hash:
            raise bad_request("This Idempotency-Key was used for another request.", code="idempotency_key_reused")
        return row
    sql = "SELECT * FROM jobs WHERE key_id = ? AND request_hash = ? AND created_at > ? ORDER BY n DESC"
    return state.db.one(sql, (key_id, request_hash, now() - REPEATED_SECONDS)) if retry else None


def add_job(
    state: State, request: JobRequest, spec: JobSpec, *, key_id: str, hash: str, idempotency: str | None
) -> Row:
    """Creates a job: its folder with links to the rows, flushed to the disk, then its row.

    Raises ApiError 404 for a file that is gone.
    """
    folder = job_folder(state, spec.id)
    try:
        folder.path.mkdir()
        link_file(state, request.training_file, folder.training)
        if request.validation_file is not None:
            link_file(state, request.validation_file, folder.validation)
        spec.write(folder)
        flush(state.jobs)
    except OSError as error:
        shutil.rmtree(folder.path, ignore_errors=True)
        raise disk_error(error, "The job was not created") from error
    columns = {
        "id": spec.id, "created_at": now(), "base": request.model, "status": "validating_files",
        "request": json.dumps({**asdict(request), "hyperparameters": request.hyperparameters.shown()}),
        "seed": request.seed, "suffix": request.suffix, "model_tag": os.urandom(TAG // 2).hex(),
        "training_file": request.training_file, "validation_file": request.validation_file,
        "metadata": json.dumps(dict(request.metadata)), "key_id": key_id, "request_hash": hash,
        "idempotency_key": idempotency,
    }  # fmt: skip
    with state.db.write() as connection:
        marks = ", ".join("?" * len(columns))
        connection.execute(f"INSERT INTO jobs ({', '.join(columns)}) VALUES ({marks})", list(columns.values()))
        add_event(state, spec.id, NewEvent(kind="created", message=f"Created fine-tuning job: {spec.id}"))
        add_event(
            state, spec.id, NewEvent(kind="validating", message=f"Validating training file: {training_of(request)}")
        )
    return job_of(state, spec.id)


def drop_folder(state: State, id: str) -> None:
    """Deletes the folder of a job that was not entered."""
    shutil.rmtree(job_folder(state, id).path, ignore_errors=True)


def training_of(request: JobRequest) -> str:
    """The files of a request, in words."""
    if request.validation_file is None:
        return request.training_file
    return f"{request.training_file} and validation file: {request.validation_file}"


def move(state: State, id: str, to: str, *before: str, **columns: Any) -> bool:
    """Changes the state of a job, and columns with it, if its state is one of `before`; False if it is not."""
    values = {"status": to, **columns}
    if to in ENDED:
        values.setdefault("finished_at", now())
    sets = ", ".join(f"{name} = ?" for name in values)
    marks = ", ".join("?" * len(before))
    with state.db.write() as connection:
        sql = f"UPDATE jobs SET {sets} WHERE id = ? AND status IN ({marks})"
        return connection.execute(sql, (*values.values(), id, *before)).rowcount == 1


def set_columns(state: State, id: str, **columns: Any) -> None:
    """Changes columns of a job, whatever its state."""
    sets = ", ".join(f"{name} = ?" for name in columns)
    with state.db.write() as connection:
        connection.execute(f"UPDATE jobs SET {sets} WHERE id = ?", (*columns.values(), id))


def cancel_job(state: State, id: str) -> Row:
    """Ends a job, at once for the client; its worker ends soon. Raises ApiError 400 if it has ended, and 404."""
    return _requested(state, id, "cancelled", UNFINISHED, NewEvent(kind="cancelled", message="Job cancelled"))


def pause_job(state: State, id: str) -> Row:
    """Pauses a job, which saves first if it runs. Raises ApiError 400 if it cannot be paused, and 404."""
    with state.db.write():
        if move(state, id, "pausing", "running", stop_requested=1):
            return job_of(state, id)
        event = NewEvent(kind="paused", message="Job paused", step=_turns(state, id))
        return _requested(state, id, "paused", ("queued",), event)


def resume_job(state: State, id: str) -> Row:
    """Puts a paused job into the queue. Raises ApiError 400 if it is not paused, and 404."""
    event = NewEvent(kind="resumed", message="Job resumed, and queued", step=_turns(state, id))
    return _requested(state, id, "queued", ("paused",), event, stop_requested=0)


def _requested(state: State, id: str, to: str, before: Sequence[str], event: NewEvent, **columns: Any) -> Row:
    with state.db.write():
        row = job_of(state, id)
        if not move(state, id, to, *before, **columns):
            raise bad_request(
                f"The job is {row['status']}; to become {to} it must be {' or '.join(before)}.",
                code="invalid_job_state",
            )
        add_event(state, id, event)
    return job_of(state, id)


def _turns(state: State, id: str) -> int:
    """How often a job was paused or resumed, by which these events are told apart."""
    sql = "SELECT count(*) AS n FROM events WHERE job_id = ? AND kind IN ('paused', 'resumed')"
    row = state.db.one(sql, (id,))
    return 0 if row is None else int(row["n"])


def paused_event(state: State, id: str, step: int) -> NewEvent:
    """The event of a worker that has saved a step and ended."""
    message = f"Job paused at step {step}, which is saved" if step else "Job paused"
    return NewEvent(kind="paused", message=message, step=_turns(state, id), data={"step": step})


def forget_unknown_jobs(state: State) -> None:
    """After a crash: deletes folders of jobs without a row. No request may be under way."""
    known = {row["id"] for row in state.db.all("SELECT id FROM jobs")}
    for folder in state.jobs.iterdir():
        if folder.name not in known:
            shutil.rmtree(folder, ignore_errors=True)


def new_job_id() -> str:
    """An id for a job."""
    return new_id("ftjob-")


def check_files(state: State, request: JobRequest) -> None:
    """Raises ApiError 404 for a file that is not there, and 400 for one of another purpose."""
    for name in ("training_file", "validation_file"):
        id = getattr(request, name)
        if id is not None and (row := file_of(state, id))["purpose"] != "fine-tune":
            raise bad_request(f"{id} is for {row['purpose']}, not for fine-tune.", name)


def request_of(row: Row) -> Mapping[str, Any]:
    """The request of a job, as plain values."""
    request = json.loads(row["request"])
    return dict(request)
