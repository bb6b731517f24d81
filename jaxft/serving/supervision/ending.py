"""The end of a worker, and what its job becomes."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.files.atomic import write_file
from jaxft.serving.jobs.folder import read_object
from jaxft.serving.jobs.metrics import checkpoint_metrics, read_rows, step_metrics_csv
from jaxft.serving.storage.database import Row
from jaxft.serving.storage.events import NewEvent, add_event, count_events
from jaxft.serving.storage.files import RESULTS, NewFile, add_file, new_file_id
from jaxft.serving.storage.jobs import ENDED, UNFINISHED, job_folder, job_of, jobs_in, move, paused_event, set_columns
from jaxft.serving.storage.models import model_name, take_export
from jaxft.serving.storage.state import State
from jaxft.serving.supervision.reading import take_checkpoints
from jaxft.serving.supervision.watch import Watch

MOST_DEATHS = 3  # of a job's workers without a new checkpoint
RETRY_SECONDS = 1.0
TERM, KILL = 15, 9


def settle(state: State, id: str, watch: Watch) -> None:
    """Makes of a job what its ended worker says; a worker that says nothing has died."""
    signal = watch.exit_signal()
    job, outcome = job_of(state, id), read_object(watch.folder.outcome)
    if outcome is None and signal == TERM and watch.stopped_at is not None:
        outcome = {"state": "stopped", "step": watch.folder.newest_checkpoint()}  # before it could answer the signal
    if job["status"] in ENDED:
        watch.active = False
        return
    take_checkpoints(state, id, watch)
    if outcome is None:
        _died(state, job, watch, signal)
    elif outcome["state"] == "failed":
        fail(state, job, outcome["error"])
    elif outcome["state"] == "stopped":
        _stopped(state, job, int(outcome.get("step", 0)))
    elif outcome["state"] == "succeeded":
        _succeeded(state, job, watch, outcome)
    watch.active = False


def fail(state: State, job: Row, error: Mapping[str, Any]) -> None:
    """Ends a job with an error: code, message, param."""
    with state.db.write():
        shown = {name: error.get(name) for name in ("code", "message", "param")}
        if move(state, job["id"], "failed", *UNFINISHED, error=json.dumps(shown)):
            message = f"The job failed: {error.get('message')}"
            add_event(state, job["id"], NewEvent(kind="failed", level="error", message=message, data=shown))


def fail_lost_jobs(state: State) -> None:
    """At the start of a server: ends the jobs whose folder is gone, since no worker could go on with them."""
    for job in jobs_in(state, *UNFINISHED):
        if not job_folder(state, job["id"]).spec.is_file():
            message = "The folder of the job is gone from the state of the server. Create the job again."
            fail(state, job, {"code": "job_lost", "message": message, "param": None})


def _stopped(state: State, job: Row, step: int) -> None:
    with state.db.write():
        if move(state, job["id"], "paused", "pausing"):
            add_event(state, job["id"], paused_event(state, job["id"], step))
        elif move(state, job["id"], "queued", "running"):
            message = f"The worker stopped at step {step}, which is saved; the job is queued again"
            turn = count_events(state, job["id"], "stopped")
            add_event(state, job["id"], NewEvent(kind="stopped", step=turn, message=message, data={"step": step}))


def _died(state: State, job: Row, watch: Watch, signal: int | None) -> None:
    newest = watch.folder.newest_checkpoint()
    deaths = 1 if newest > job["death_step"] else job["deaths"] + 1
    how = "Its worker died" if signal is None else f"Its worker died by signal {signal}"
    if signal == KILL:
        how += ", which is mostly the kernel's for want of memory"
    with state.db.write():
        turn = count_events(state, job["id"], "died")
        event = NewEvent(kind="died", step=turn, level="warn", message=how, data={"signal": signal, "step": newest})
        add_event(state, job["id"], event)
        set_columns(state, job["id"], deaths=deaths, death_step=newest)
        if move(state, job["id"], "paused", "pausing"):
            add_event(state, job["id"], paused_event(state, job["id"], newest))
        elif job["status"] != "paused" and deaths >= MOST_DEATHS:
            message = f"{how}, {deaths} times without a new checkpoint. Its log is the artifact worker.log."
            fail(state, job, {"code": "worker_died", "message": message, "param": None})
        else:
            move(state, job["id"], "queued", "running")
    watch.not_before = time.monotonic() + RETRY_SECONDS * deaths


def _succeeded(state: State, job: Row, watch: Watch, outcome: Mapping[str, Any]) -> None:
    """The last export becomes the job's model, and the metrics become files. Raises OSError if the disk is full."""
    step, rows = int(outcome["step"]), read_rows(watch.folder.metrics)
    source = watch.folder.exports / "final"
    take_export(state, job, step, source, final=True, metrics=checkpoint_metrics(rows, step))
    contents = {"step_metrics.csv": step_metrics_csv(rows), "metrics.jsonl": watch.folder.metrics.read_bytes()}
    results: list[NewFile] = []
    try:
        for name, content in contents.items():
            results.append(_result(state, name, content))
        done = _enter_success(state, job, outcome, results)
    except BaseException:  # it is tried again
        _drop(state, results)
        raise
    if not done:
        _drop(state, results)


def _drop(state: State, files: Sequence[NewFile]) -> None:
    for file in files:
        (state.files / file.id).unlink(missing_ok=True)


def _enter_success(state: State, job: Row, outcome: Mapping[str, Any], results: Sequence[NewFile]) -> bool:
    """Whether the job has succeeded now; False if it was cancelled meanwhile."""
    name = model_name(job)
    with state.db.write():
        done = move(
            state,
            job["id"],
            "succeeded",
            "queued",
            "running",
            "pausing",
            fine_tuned_model=name,
            trained_tokens=outcome.get("trained_tokens"),
            result_files=json.dumps([file.id for file in results]),
        )
        if not done:
            return False
        for file in results:
            add_file(state, file)
        data = {"model": name}
        add_event(state, job["id"], NewEvent(kind="model", message=f"New fine-tuned model created: {name}", data=data))
        add_event(state, job["id"], NewEvent(kind="succeeded", message="The job has successfully completed"))
    return True


def _result(state: State, name: str, content: bytes) -> NewFile:
    id = new_file_id()
    write_file(state.files / id, lambda file: file.write(content))
    sha256 = hashlib.sha256(content).hexdigest()
    return NewFile(id=id, filename=name, bytes=len(content), purpose=RESULTS, sha256=sha256)


def clean(watch: Watch) -> None:
    """Deletes what only a job that goes on needs: the checkpoints, which are large, and the links to the rows."""
    shutil.rmtree(watch.folder.run / "checkpoints", ignore_errors=True)
    shutil.rmtree(watch.folder.exports, ignore_errors=True)
    for path in (watch.folder.training, watch.folder.validation):
        if path.is_file():
            os.unlink(path)
