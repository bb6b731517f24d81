"""Events of jobs. Each has a key of job, kind and step, so that what is read twice is entered once."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxft.serving.storage.database import Row
from jaxft.serving.storage.state import State, new_id, now


@dataclass(frozen=True, kw_only=True)
class NewEvent:
    """An event. kind and step: its key within the job. metrics: whether it is of the type `metrics`."""

    kind: str
    message: str
    step: int = 0
    level: str = "info"
    metrics: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)


def add_event(state: State, job: str, event: NewEvent) -> bool:
    """Enters an event; False if the job has one of this kind and step."""
    kind = "metrics" if event.metrics else "message"
    values = (
        new_id("ftevent-"), job, event.kind, event.step, now(), event.level, kind, event.message,
        json.dumps(dict(event.data)),
    )  # fmt: skip
    columns = "id, job_id, kind, step, created_at, level, type, message, data"
    with state.db.write() as connection:
        sql = f"INSERT OR IGNORE INTO events ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        return connection.execute(sql, values).rowcount == 1


def count_events(state: State, job: str, kind: str) -> int:
    """How many events of a kind a job has."""
    row = state.db.one("SELECT count(*) AS n FROM events WHERE job_id = ? AND kind = ?", (job, kind))
    return 0 if row is None else int(row["n"])


def last_metrics(state: State, job: str) -> Mapping[str, Any]:
    """The data of the newest step that is logged, with `created_at`; empty before the first one."""
    sql = "SELECT data, created_at FROM events WHERE job_id = ? AND kind = 'metrics' ORDER BY step DESC LIMIT 1"
    row = state.db.one(sql, (job,))
    return {} if row is None else {**json.loads(row["data"]), "created_at": row["created_at"]}


def show_event(row: Row) -> dict[str, Any]:
    """The event as the protocol has it."""
    shown = {name: row[name] for name in ("id", "created_at", "level", "message", "type")}
    return {"object": "fine_tuning.job.event", **shown, "data": json.loads(row["data"])}
