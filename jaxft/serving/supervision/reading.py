"""What workers tell, entered in the database. All of it may be entered again, and changes nothing then."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.serving.jobs.folder import read_object
from jaxft.serving.jobs.metrics import checkpoint_metrics, event_of, parse_row, read_rows
from jaxft.serving.storage.database import Row
from jaxft.serving.storage.events import NewEvent, add_event
from jaxft.serving.storage.jobs import job_of, move, request_of, set_columns
from jaxft.serving.storage.models import model_name, take_export, update_metrics
from jaxft.serving.storage.state import State
from jaxft.serving.supervision.watch import Watch

BATCH = ("parts", "peak_bytes", "limit_bytes", "fits")  # what a job's plan shows of its batch
SILENT = ("phase", "checkpoint", "model")  # kinds that have an effect, and no event of the same name


def read_worker(state: State, id: str, watch: Watch) -> Mapping[str, Any] | None:
    """Enters what is new of a worker; returns the devices that it told of, if it did.

    What could not be entered, since the disk is full, is new again at the next call.
    """
    positions = watch.events.position, watch.metrics.position
    events, lines = watch.new_events(), watch.metrics.lines()
    if not events and not lines:
        return None
    try:
        return _enter_all(state, id, watch, events, lines)
    except BaseException:
        watch.events.position, watch.metrics.position = positions
        raise


def _enter_all(
    state: State, id: str, watch: Watch, events: Sequence[Mapping[str, Any]], lines: Sequence[bytes]
) -> Mapping[str, Any] | None:
    devices = None
    with state.db.write():  # one flush to the disk for all of it
        for event in events:
            devices = event.get("data", {}).get("devices", devices)
            _enter(state, job_of(state, id), watch, event)
        total = _total_steps(job_of(state, id))
        for row in filter(None, map(parse_row, lines)):
            if add_event(state, id, event_of(row, total)) and "eval_loss" in row:
                # A job that was paused within an evaluation has made a model of the step before.
                update_metrics(state, id, row["step"], checkpoint_metrics(read_rows(watch.folder.metrics), row["step"]))
    return devices


def _enter(state: State, job: Row, watch: Watch, event: Mapping[str, Any]) -> None:
    id, kind, step, data = job["id"], event["kind"], int(event.get("step", 0)), event.get("data") or {}
    if kind not in SILENT:  # before what follows from it, as clients read them
        level = event.get("level", "info")
        message = str(event.get("message", kind))
        add_event(state, id, NewEvent(kind=kind, step=step, level=level, message=message, data=data))
    if kind == "phase":
        set_columns(state, id, phase=str(data.get("phase", ""))[:40])
    elif kind == "checkpoint":
        _take(state, job, watch, step)
    elif kind == "validated":
        _validated(state, job, watch)
    elif kind == "batch":
        _change_plan(state, job, batch={name: data.get(name) for name in BATCH})
    elif kind == "started":
        move(state, id, "running", "queued")
        if isinstance(data.get("steps"), int):  # of which the worker knows once it knows its devices
            _change_plan(state, job_of(state, id), steps=data["steps"])


def _validated(state: State, job: Row, watch: Watch) -> None:
    resolved = read_object(watch.folder.resolved)
    if resolved is None or job["status"] != "validating_files":  # every worker of a job tells it
        return
    set_columns(state, job["id"], resolved=json.dumps({name: resolved.get(name) for name in _SHOWN}))
    if request_of(job)["start"]:
        if move(state, job["id"], "queued", "validating_files"):
            add_event(state, job["id"], NewEvent(kind="queued", message="Files validated, moving job to queued state"))
    elif move(state, job["id"], "paused", "validating_files"):
        message = "Files validated, and the job waits: resume it to start (start: false)"
        add_event(state, job["id"], NewEvent(kind="waiting", message=message))


_SHOWN = ("hyperparameters", "examination", "plan", "warnings")


def _change_plan(state: State, job: Row, **values: Any) -> None:
    resolved = json.loads(job["resolved"]) if job["resolved"] else {}
    if "plan" in resolved and not values.items() <= resolved["plan"].items():
        resolved["plan"] |= values
        set_columns(state, job["id"], resolved=json.dumps(resolved))


def take_checkpoints(state: State, id: str, watch: Watch) -> None:
    """Makes models of exported checkpoints of which a worker has told nothing, or a power cut has taken the word."""
    names = [folder.name.removeprefix("step-") for folder in watch.folder.exports.glob("step-*")]
    for step in sorted(int(name) for name in names if name.isdecimal()):
        _take(state, job_of(state, id), watch, step)


def _take(state: State, job: Row, watch: Watch, step: int) -> None:
    """Makes a model of an exported checkpoint."""
    metrics = checkpoint_metrics(read_rows(watch.folder.metrics), step)
    source = watch.folder.exports / f"step-{step}"
    if take_export(state, job, step, source, final=False, metrics=metrics):
        name = model_name(job, step)
        message = f"Checkpoint created at step {step}: {name}"
        add_event(state, job["id"], NewEvent(kind="checkpoint", step=step, message=message, data={"model": name}))


def _total_steps(job: Row) -> int:
    resolved = json.loads(job["resolved"]) if job["resolved"] else {}
    return int((resolved.get("plan") or {}).get("steps", 0))
