"""A job as the protocol shows it, with jaxft's own part."""

import json
from collections.abc import Mapping
from typing import Any

from jaxft.serving.jobs.estimate import estimate
from jaxft.serving.storage.database import Row
from jaxft.serving.storage.events import last_metrics
from jaxft.serving.storage.jobs import request_of
from jaxft.serving.storage.models import ORGANIZATION, tuned_models
from jaxft.serving.storage.state import State


def show_job(state: State, row: Row) -> dict[str, Any]:
    """The fine_tuning.job object. Numbers stand in the place of `auto` once the rows are examined."""
    request = request_of(row)
    resolved: Mapping[str, Any] = json.loads(row["resolved"]) if row["resolved"] else {}
    hyperparameters = resolved.get("hyperparameters") or request["hyperparameters"]
    last = last_metrics(state, row["id"])
    return {
        "id": row["id"],
        "object": "fine_tuning.job",
        "created_at": row["created_at"],
        "finished_at": row["finished_at"],
        "estimated_finish": _estimated_finish(row, last),
        "status": row["status"],
        "model": row["base"],
        "fine_tuned_model": row["fine_tuned_model"],
        "organization_id": f"org-{ORGANIZATION}",
        "training_file": row["training_file"],
        "validation_file": row["validation_file"],
        "result_files": json.loads(row["result_files"]),
        "trained_tokens": row["trained_tokens"],
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "seed": row["seed"],
        "metadata": json.loads(row["metadata"]),
        "integrations": [],
        "error": json.loads(row["error"]) if row["error"] else None,
        "jaxft": _ours(state, row, request, resolved, last),
    }


def _ours(
    state: State, row: Row, request: Mapping[str, Any], resolved: Mapping[str, Any], last: Mapping[str, Any]
) -> dict[str, Any]:
    progress = {name: last.get(name) for name in ("step", "total_steps", "train_loss", "tokens_per_second")}
    artifacts = [f"step-{one['step']}.tar" for one in tuned_models(state, row["id"])]
    return {
        "number": row["n"],
        "start": request["start"],
        "suffix": row["suffix"],
        "config": request["config"],
        "phase": row["phase"] if row["status"] in ("validating_files", "running", "pausing") else "",
        "examination": resolved.get("examination"),
        "warnings": resolved.get("warnings") or [],
        "plan": resolved.get("plan"),
        "estimate": estimate(state, row, resolved.get("plan") or {}) if not last else None,
        "progress": progress if last else None,
        "deaths": row["deaths"],
        "artifacts": [*artifacts, "worker.log"],
    }


def _estimated_finish(row: Row, last: Mapping[str, Any]) -> int | None:
    """By the time of a step, which is known once two of them are logged."""
    seconds = last.get("step_seconds")
    if row["status"] != "running" or seconds is None:
        return None
    return round(last["created_at"] + (last["total_steps"] - last["step"]) * seconds)
