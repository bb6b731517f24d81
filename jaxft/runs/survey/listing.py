"""`jaxft runs`: the runs below a folder, each with its state, read from small files alone and without JAX."""

import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxft.checkpoint import manifest
from jaxft.checkpoint.steps.access import steps_in
from jaxft.errors import CheckpointError, ConfigError, counted, listed
from jaxft.files.buckets.store import is_bucket
from jaxft.files.buckets.working_copy import address_of, checkpoints_of, owner_now, runs_in_bucket, shown, small_copy
from jaxft.files.json_fields import is_finite
from jaxft.files.run_folder import (
    ADAPTER,
    CHECKPOINTS,
    COMMAND,
    CONFIG,
    MARK,
    MERGED,
    METRICS,
    MODEL,
    SUMMARY,
    is_run_config,
    is_run_folder,
    read_json,
)
from jaxft.home import local_path
from jaxft.runs.identity.record import Record, read_record
from jaxft.system import described

DEPTH = 6  # folders within each other that are looked into
TAIL_BYTES = 2**16  # of metrics.jsonl that are read: its last rows
OUTPUT = "--output="
GONE = "its checkpoints were deleted: it is kept as it is, and can neither go on nor be exported again"
SESSION = "go on: Session.load_state"
RUNNING, INTERRUPTED, FINISHED, BROKEN = "running", "interrupted", "finished", "broken"
# Final metrics that are told, if the summary has them.
TOLD = ("tuned_score", "base_score", "eval_loss", "eval_accuracy", "eval_reward")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run folder as it is now.

    state: `running`, `interrupted`, `finished` or `broken`. step: the last one in the log of a running run, the newest
    whole checkpoint of an interrupted one, the last one of a finished one; None if there is none. steps: the length of
    the run, if it is known. owner: who writes there. metrics: the newest row of the log, or the final ones of a
    finished run. command: what goes on with an interrupted run. problem: what is broken, and how to mend it. note:
    what else is to say. created: when it began.
    """

    folder: str
    state: str
    step: int | None = None
    steps: int | None = None
    owner: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    problem: str | None = None
    note: str | None = None
    created: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that have a value."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}


def runs_below(folder: str | os.PathLike[str]) -> list[RunState]:
    """The runs in a folder and in folders below it, by path; the folder itself if it is a run.

    Hidden folders, links, what is within a run and what is deeper than DEPTH folders are passed over. Raises
    ConfigError if there is no such folder.
    """
    if is_bucket(folder):
        return [_state_in_bucket(address) for address in runs_in_bucket(os.fspath(folder))]
    path = Path(local_path(folder))
    if not path.is_dir():
        what = "is a file" if path.exists() else "is not there"
        raise ConfigError(f"{path} {what}: give the folder in which runs are, such as the default, runs")
    return [state_of(run) for run in _run_folders(path, DEPTH)]


def _state_in_bucket(address: str) -> RunState:
    try:
        with small_copy(address) as folder:
            return replace(state_of(folder), folder=address)
    except (ConfigError, CheckpointError) as error:  # of its names alone: the others are listed
        return RunState(folder=address, state=BROKEN, problem=str(error))


def state_of(folder: Path) -> RunState:
    """The state of one run folder: broken, with the reason, if it cannot be read."""
    try:
        return _state_of(folder)
    except CheckpointError as error:
        return RunState(folder=str(folder), state=BROKEN, problem=str(error))
    except OSError as error:
        return RunState(folder=str(folder), state=BROKEN, problem=described(error))


def _state_of(folder: Path) -> RunState:
    owner = owner_now(folder)
    record = record_in(folder) or Record(created="")
    created, steps = record.created or None, record.steps
    if owner is not None:
        row = _last_row(folder)
        return RunState(
            folder=str(folder),
            state=RUNNING,
            step=row.get("step"),
            steps=steps,
            owner={"what": owner.what, "host": owner.host, "pid": owner.pid, "since": owner.since},
            metrics=row,
            created=created,
        )
    checkpoints = steps_in(checkpoints_of(folder))
    whole, unexplained = checkpoints.whole(), [str(step) for step in checkpoints.without_manifest()]
    newest = max(whole, default=None)
    problem = _problem(folder, newest, unexplained)
    if problem is not None:
        return RunState(folder=str(folder), state=BROKEN, step=newest, steps=steps, problem=problem, created=created)
    summary = _object(folder / SUMMARY)
    if summary is not None:
        return RunState(
            folder=str(folder),
            state=FINISHED,
            step=summary.get("steps"),
            steps=steps,
            metrics={key: value for key, value in summary.items() if _is_number(value)},
            note=None if newest is not None else GONE,
            created=created,
        )
    return RunState(
        folder=str(folder),
        state=INTERRUPTED,
        step=newest,
        steps=steps,
        metrics=_last_row(folder),
        command=_command(folder),
        note=SESSION if steps is None and newest is not None else None,
        created=created,
    )


def record_in(folder: Path) -> Record | None:
    """The record in a run folder; None if it has none. Raises CheckpointError if it is damaged or has wrong types."""
    try:
        record = read_record(folder)
    except RecursionError as error:
        raise CheckpointError(f"{folder / MARK} is damaged: it is nested too deep. Restore it from a copy.") from error
    return record


def describe(run: RunState) -> str:
    """What is to say of a run, in one line, or in several if it is broken."""
    of = f" of {run.steps:,}" if run.steps is not None else ""
    if run.state == BROKEN:
        return run.problem or ""
    if run.state == RUNNING:
        owner = run.owner or {}
        use = run.metrics.get("goodput")
        share = f", goodput {use:.1%}" if _is_number(use) else ""
        step = "before its first logged step" if run.step is None else f"step {run.step:,}{of}"
        return f"{step}{share}; {owner['what']} on {owner['host']}, process {owner['pid']}, since {owner['since']}"
    if run.state == FINISHED:
        told = [f"{name} {run.metrics[name]:.4f}" for name in TOLD if name in run.metrics]
        steps = f"{run.step:,} steps" if isinstance(run.step, int) else "its last step is not known"
        return ", ".join([steps, *told, *filter(None, [run.note])])
    done = "before its first checkpoint" if run.step is None else f"at step {run.step:,}{of}"
    how = f"go on: {run.command}" if run.command else run.note or "go on: give the same command again"
    return f"{done}; {how}"


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if is_run_folder(folder):
        yield folder
        return
    if depth == 0:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # a folder of another user
        return
    for entry in entries:
        if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
            yield from _run_folders(folder / entry.name, depth - 1)


def _problem(folder: Path, newest: int | None, unexplained: list[str]) -> str | None:
    """What is broken in a folder that nobody writes, and how to mend it; None if nothing is."""
    if newest is not None and not is_run_config(folder / CONFIG):
        return (
            f"{CONFIG} is missing, damaged or not that of a run, but there are checkpoints: restore it from a copy, or "
            f"start the command in {COMMAND} in a new folder and copy the {CONFIG} that it writes"
        )
    if newest is None and unexplained:
        return (
            f"there is no whole checkpoint, and {listed(unexplained)} in {CHECKPOINTS} without {manifest.NAME}: copy "
            "that file from where the folder was copied from; else the run begins anew"
        )
    if (folder / SUMMARY).exists() and _object(folder / SUMMARY) is None:
        return f"{SUMMARY} is damaged: delete it and give the command in {COMMAND} again, which writes it anew"
    exports = [name for name in (ADAPTER, MERGED, MODEL) if (folder / name).exists()]
    if newest is None and exports and not (folder / SUMMARY).exists():
        return (
            f"its checkpoints are gone, and {listed(exports)} {'is' if len(exports) == 1 else 'are'} left: move what "
            "you need to another folder and delete this one"
        )
    return None


def _command(folder: Path) -> str | None:
    """The command of a run, which goes on with it where it is now, if the folder has been moved too."""
    if not (folder / COMMAND).is_file():  # a pipe is not waited for
        return None
    try:
        words = shlex.split((folder / COMMAND).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if any("\0" in word for word in words):  # no program takes such a word
        return None
    words = [f"{OUTPUT}{shown(folder)}" if _is_other(word, folder) else word for word in words]
    return shlex.join(words) or None


def _is_other(word: str, folder: Path) -> bool:
    """Whether a word of a command names another run folder."""
    if (address := address_of(folder)) is not None:
        return word.startswith(OUTPUT) and word.removeprefix(OUTPUT) != address
    return word.startswith(OUTPUT) and os.path.realpath(local_path(word.removeprefix(OUTPUT))) != os.path.realpath(
        folder
    )


def _last_row(folder: Path) -> dict[str, Any]:
    """The newest row of metrics.jsonl that has the loss of a step; {} without one."""
    if not (folder / METRICS).is_file():  # a pipe is not waited for
        return {}
    try:
        with open(folder / METRICS, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # cut at the beginning of what was read, or being written
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and "loss" in row:
            return row
    return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and is_finite(value)


def _object(path: Path) -> dict[str, Any] | None:
    try:
        value = read_json(path)
    except (OSError, ValueError, RecursionError, CheckpointError):
        return None
    return value if isinstance(value, dict) else None


def summarize(runs: list[RunState]) -> str:
    """The number of runs by state."""
    by_state = [(sum(run.state == state for run in runs), state) for state in (RUNNING, INTERRUPTED, FINISHED, BROKEN)]
    states = ", ".join(f"{count} {state}" for count, state in by_state if count)
    return f"{counted(len(runs), 'run')}: {states}" if runs else "no runs"
