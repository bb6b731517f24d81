"""Tuned models: the export of a checkpoint is a model at once, and the last one is the job's."""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.files.atomic import flush
from jaxft.serving.http.errors import bad_request, no_such
from jaxft.serving.storage.database import Row
from jaxft.serving.storage.state import State, new_id, now

ORGANIZATION = "jaxft"  # one trust domain a server
KEPT = 3  # newest checkpoints of a job that are models


def model_name(job: Row, step: int | None = None) -> str:
    """The name of a job's model, or of its checkpoint at a step. Names are never used again."""
    name = f"ft:{job['base']}:{ORGANIZATION}:{job['suffix']}:{job['model_tag']}"
    return name if step is None else f"{name}:ckpt-step-{step}"


def folder_of(state: State, row: Row) -> Path:
    """The folder of a tuned model."""
    return state.models / str(row["folder"])


def take_export(state: State, job: Row, step: int, source: Path, *, final: bool, metrics: Mapping[str, Any]) -> bool:
    """Moves the folder that a worker exported to the models, and enters it; False if it was entered before.

    Safe to repeat after a crash between the two: the folder is there then, and `source` is not.
    """
    name, folder = model_name(job, None if final else step), f"{job['id']}-{'final' if final else step}"
    if state.db.one("SELECT id FROM models WHERE id = ?", (name,)) is not None:
        return False
    target = state.models / folder
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        os.rename(source, target)
        flush(state.models)
    if not target.is_dir():
        return False
    kind = "full" if (target / "config.json").is_file() else "adapter"
    values = (name, job["base"], job["id"], new_id("ftckpt-"), step, kind, folder, now(), json.dumps(dict(metrics)))
    columns = "id, base, job_id, checkpoint_id, step, kind, folder, created_at, metrics"
    with state.db.write() as connection:
        connection.execute(f"INSERT INTO models ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
    _drop_old(state, job["id"])
    return True


def update_metrics(state: State, job: str, step: int, metrics: Mapping[str, Any]) -> None:
    """Enters the metrics of a job's checkpoint, if it is a model already."""
    with state.db.write() as connection:
        values = (json.dumps(dict(metrics)), job, step)
        connection.execute("UPDATE models SET metrics = ? WHERE job_id = ? AND step = ?", values)


def model_of(state: State, id: str) -> Row:
    """The row of a tuned model. Raises ApiError 404, with the nearest name."""
    row = state.db.one("SELECT * FROM models WHERE id = ? AND deleted = 0", (id,))
    if row is None:
        known = [one["id"] for one in state.db.all("SELECT id FROM models WHERE deleted = 0")]
        raise no_such("model", id, "model_not_found", known)
    return row


def tuned_models(state: State, job: str | None = None) -> list[Row]:
    """The tuned models, newest first; of one job, or of all."""
    where, values = ("", ()) if job is None else (" AND job_id = ?", (job,))
    return state.db.all(f"SELECT * FROM models WHERE deleted = 0{where} ORDER BY n DESC", values)


def delete_model(state: State, id: str) -> None:
    """Deletes a tuned model: its name at once, its folder when its last answer has ended. Raises ApiError 404."""
    row = model_of(state, id)
    with state.db.write() as connection:
        connection.execute("UPDATE models SET deleted = 1 WHERE id = ?", (id,))
    state.uses.when_free(row["folder"], lambda: shutil.rmtree(folder_of(state, row), ignore_errors=True))


def refuse_base(id: str, bases: Mapping[str, str]) -> None:
    """Raises ApiError 400 for a base, which the operator named and no request deletes."""
    if id in bases:
        raise bad_request(f"{id} is a base model of this server, and stays.", "model")


def show_model(row: Row) -> dict[str, Any]:
    """The model as the protocol has it."""
    ours = {name: row[name] for name in ("base", "job_id", "step", "kind")}
    return {
        "id": row["id"], "object": "model", "created": row["created_at"], "owned_by": ORGANIZATION, "jaxft": ours,
    }  # fmt: skip


def show_base(name: str, created: int) -> dict[str, Any]:
    """A base as the protocol has it."""
    ours = {"base": name, "job_id": None, "step": None, "kind": "base"}
    return {"id": name, "object": "model", "created": created, "owned_by": "operator", "jaxft": ours}


def show_checkpoint(row: Row) -> dict[str, Any]:
    """The checkpoint of a job as the protocol has it."""
    return {
        "id": row["checkpoint_id"], "object": "fine_tuning.job.checkpoint", "created_at": row["created_at"],
        "fine_tuned_model_checkpoint": row["id"], "fine_tuning_job_id": row["job_id"], "step_number": row["step"],
        "metrics": json.loads(row["metrics"]),
    }  # fmt: skip


def _drop_old(state: State, job: str) -> None:
    for row in tuned_models(state, job)[KEPT:]:
        delete_model(state, row["id"])


def forget_unknown_models(state: State) -> None:
    """After a crash: deletes folders without a row, and rows without a folder. No worker's export may be under way."""
    rows = tuned_models(state)
    unfinished = {row["id"] for row in state.db.all("SELECT id FROM jobs WHERE status NOT IN ('succeeded', 'failed')")}
    known = {row["folder"] for row in rows}
    for folder in state.models.iterdir():
        # An unfinished job may have moved one whose row is still to be entered.
        if folder.name not in known and folder.name.rpartition("-")[0] not in unfinished:
            shutil.rmtree(folder, ignore_errors=True)
    for row in rows:
        if not folder_of(state, row).is_dir():
            with contextlib.suppress(OSError), state.db.write() as connection:
                connection.execute("UPDATE models SET deleted = 1 WHERE id = ?", (row["id"],))
