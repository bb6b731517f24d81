"""The metrics of a run under the protocol's names: in events, in checkpoints and in result files."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.serving.storage.events import NewEvent

TRAINED = {
    "train_loss": "loss", "train_mean_token_accuracy": "mean_token_accuracy", "learning_rate": "learning_rate",
    "tokens_per_second": "tokens_per_second", "step_seconds": "step_seconds",
}  # fmt: skip
HELD_OUT = {"full_valid_loss": "eval_loss", "full_valid_mean_token_accuracy": "eval_mean_token_accuracy"}
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A row of metrics.jsonl; None for a line that is none, such as one that is cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none if there is no such file."""
    if not path.is_file():
        return []
    return [row for line in path.read_bytes().splitlines() if (row := parse_row(line)) is not None]


def event_of(row: Mapping[str, Any], total_steps: int) -> NewEvent:
    """The event of a logged step, or of an evaluation, which is a row of its own."""
    step, held_out = row["step"], "eval_loss" in row
    names = HELD_OUT if held_out else TRAINED
    data = {"step": step, "total_steps": total_steps} | _picked(row, names)
    what = f"full validation loss={row['eval_loss']:.4f}" if held_out else f"training loss={row.get('loss', 0.0):.4f}"
    kind = "evaluation" if held_out else "metrics"
    return NewEvent(kind=kind, step=step, message=f"Step {step}/{total_steps}: {what}", metrics=True, data=data)


def checkpoint_metrics(rows: Sequence[Mapping[str, Any]], step: int) -> dict[str, Any]:
    """The metrics of a checkpoint: the last ones that were logged up to its step."""
    out: dict[str, Any] = {}
    for row in rows:
        if row["step"] <= step:
            out |= _picked(row, {name: key for name, key in (TRAINED | HELD_OUT).items() if "second" not in key})
    out.pop("learning_rate", None)
    return {"step": step, **out}


def step_metrics_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The result file of a job: a line for each logged step, with the held-out metrics of the steps that have some."""
    by_step: dict[int, dict[str, Any]] = {}
    for row in rows:
        entry = by_step.setdefault(row["step"], {})
        keys = {
            "train_loss": "loss", "train_accuracy": "mean_token_accuracy", "valid_loss": "eval_loss",
            "valid_mean_token_accuracy": "eval_mean_token_accuracy",
        }  # fmt: skip
        entry |= _picked(row, keys)
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for step, entry in sorted(by_step.items()):
        writer.writerow([step, *(entry.get(name, "") for name in COLUMNS[1:])])
    return out.getvalue().encode()


def _picked(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    values = {name: row[key] for name, key in names.items() if key in row}
    return {name: value for name, value in values.items() if math.isfinite(value)}
