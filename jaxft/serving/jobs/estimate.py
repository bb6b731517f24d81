"""How long a job will take, before it has begun."""

from collections.abc import Mapping
from typing import Any

from jaxft.serving.storage.database import Row
from jaxft.serving.storage.events import last_metrics
from jaxft.serving.storage.state import State

WAITING = ("validating_files", "queued", "paused")
LATEST = 20  # jobs whose rates are looked for


def estimate(state: State, row: Row, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """seconds: at the rate of the newest job of the same base that has one, job_id. None if there is no such job."""
    tokens = plan.get("trained_tokens")
    if tokens is None or row["status"] not in WAITING:
        return None
    sql = "SELECT id FROM jobs WHERE base = ? AND status IN ('running', 'succeeded') ORDER BY n DESC LIMIT ?"
    for other in state.db.all(sql, (row["base"], LATEST)):
        rate = last_metrics(state, other["id"]).get("tokens_per_second")
        if rate:
            return {"seconds": round(tokens / rate), "job_id": other["id"]}
    return None
