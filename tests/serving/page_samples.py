"""A state with jobs of every kind for the page, written as workers write and read as a server reads."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from servers import MODEL

from jaxft.files.run_folder import write_json
from jaxft.serving.jobs.folder import JobFolder, JobSpec
from jaxft.serving.jobs.request import parse_job
from jaxft.serving.storage import files, jobs
from jaxft.serving.storage.state import State, open_state
from jaxft.serving.supervision.ending import settle
from jaxft.serving.supervision.reading import read_worker
from jaxft.serving.supervision.watch import Watch

MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"
STEPS = 240
PIECES = [
    {"text": f"<|im_start|>user\nWhere is my parcel? {MARKUP}<|im_end|>\n<|im_start|>assistant\n", "trained": False},
    {"text": "It is on its way, and comes on Tuesday.<|im_end|>", "trained": True},
]  # fmt: skip
RESOLVED = {
    "hyperparameters": {"n_epochs": 3, "batch_size": 32, "learning_rate_multiplier": 1.0},
    "plan": {"steps": STEPS, "epochs": 3.0, "batch_sequences": 8, "max_length": 2048, "trained_tokens": 3_932_160},
    "examination": {
        "rows": 2560, "examples": 2560, "tokens": 1_310_720, "trained_tokens": 406_323, "max_length": 2048,
        "truncated": 3, "dropped": 0, "sequences": 640, "fill": 0.97, "quantiles": {"p50": 480, "p100": 3120},
        "histogram": [[20, 280, 410], [281, 541, 1204], [542, 802, 640], [803, 1063, 218], [1064, 3120, 88]],
        "formats": {"messages": 2560}, "holds": {"system message": 120}, "skipped": 0, "bad_rows": [],
        "first_rows": [PIECES, PIECES], "validation": {"rows": 256, "tokens": 131_072},
    },
    "warnings": ["3 examples are longer than 2048 tokens and cut"],
}  # fmt: skip


def add_rows(state: State, name: str, content: bytes) -> str:
    """The id of a file of rows."""
    id = files.new_file_id()
    (state.files / id).write_bytes(content)
    files.add_file(state, files.NewFile(id=id, filename=name, bytes=len(content), purpose="fine-tune", sha256=""))
    return id


def add_job(state: State, content: dict[str, Any], name: str = "rows.jsonl", **values: Any) -> JobFolder:
    """A job whose rows are one row of this content; values: of its request."""
    request = parse_job(
        {"model": MODEL, "training_file": add_rows(state, name, json.dumps(content).encode() + b"\n"), **values}
    )
    spec = JobSpec(
        id=jobs.new_job_id(), name=MODEL, base="none", seed=request.seed, context=2048, config=dict(request.config),
        hyperparameters=asdict(request.hyperparameters),
    )  # fmt: skip
    jobs.add_job(state, request, spec, key_id="key-none", hash="", idempotency=None)
    return jobs.job_folder(state, spec.id)


def tell(folder: JobFolder, kind: str, message: str = "", step: int = 0, **data: Any) -> None:
    """What a worker writes into its file of events."""
    with open(folder.events, "a") as file:
        file.write(json.dumps({"kind": kind, "step": step, "message": message, "data": data}) + "\n")


def metrics(steps: int) -> list[dict[str, Any]]:
    """The rows of a training that learns, with an evaluation every eighty steps."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 0.6 + 1.8 * math.exp(-step / 50) + 0.08 * math.sin(7.0 * step)
        accuracy = 0.9 - 0.4 * math.exp(-step / 50) + 0.02 * math.cos(5.0 * step)
        rows.append(
            {"step": step, "loss": loss, "mean_token_accuracy": accuracy, "learning_rate": 2e-4,
             "num_tokens": 16384 * step, "tokens_per_second": 8192.0, "step_seconds": 2.0}
        )  # fmt: skip
        if step % 80 == 0:
            rows.append({"step": step, "eval_loss": loss + 0.1, "eval_mean_token_accuracy": accuracy - 0.03})
    return rows


def train(state: State, folder: JobFolder, steps: int = STEPS) -> None:
    """Writes what a worker does that trains to the end, and enters it."""
    write_json(folder.resolved, RESOLVED)
    tell(folder, "validated", "Files validated: 2,560 rows")
    tell(folder, "warning", RESOLVED["warnings"][0])
    tell(folder, "started", "Fine-tuning job started", devices={"platform": "cpu", "kind": "cpu", "count": 1})
    folder.run.mkdir()
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in metrics(steps)))
    watch = Watch(folder)
    for step in (80, 160):
        add_export(folder.exports / f"step-{step}")
        tell(folder, "checkpoint", step=step)
    read_worker(state, folder.path.name, watch)
    add_export(folder.exports / "final")
    write_json(folder.outcome, {"state": "succeeded", "step": steps, "trained_tokens": 16384 * steps})
    settle(state, folder.path.name, watch)


def add_export(folder: Path) -> None:
    """The files of an adapter."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")


def fill(folder: Path) -> dict[str, str]:
    """Fills a new state; returns the ids of jobs: done, failed, cancelled, waits (for its start)."""
    with open_state(folder) as state:
        config = {"jaxft": {"config": {"adapter.r": 32}}, "seed": 7}
        done = add_job(state, {}, f"{MARKUP}.jsonl", suffix="support-answers", metadata={"it's": 'a "test"'}, **config)
        train(state, done)
        failed = add_job(state, {}, suffix="failed.rows")
        message = f"training_file, line 3: the row has no answer: {MARKUP}"
        error = {"code": "invalid_file", "param": "training_file", "message": message}
        write_json(failed.outcome, {"state": "failed", "error": error})
        settle(state, failed.path.name, Watch(failed))
        cancelled = add_job(state, {}, suffix="given_up")
        jobs.cancel_job(state, cancelled.path.name)
        waits = add_job(state, {"steps": STEPS}, suffix="look-before", jaxft={"start": False})
        write_json(waits.resolved, RESOLVED)
        tell(waits, "validated", "Files validated: 2,560 rows")
        read_worker(state, waits.path.name, Watch(waits))
        made = {"done": done, "failed": failed, "cancelled": cancelled, "waits": waits}
        return {name: folder.path.name for name, folder in made.items()}
