"""Run logging: metrics.jsonl, TensorBoard event files and the console."""

import json
import math
import numbers
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jaxft.errors import DataError, JaxftError
from jaxft.files.atomic import write_text
from jaxft.files.run_folder import METRICS, TENSORBOARD
from jaxft.terminal.console import SafeConsole, say

# Keys whose values come from a clock: two runs that are equal in every other key are the same run.
TIMING_KEYS = (
    "tokens_per_second", "step_seconds", "eval_seconds", "elapsed_seconds", "update_seconds", "rollout_seconds",
    "reward_seconds", "rollout_tokens_per_second",
)  # fmt: skip


class RunLog:
    """Writes the metrics of a run; a context manager.

    folder: the run folder, made if absent. It gets `metrics.jsonl`, one JSON object a line, and, if tensorboardX is
    installed, `tensorboard/`. Both use the keys of `metrics` as they are. total_steps: optimizer steps of the whole
    run. resume_step: step of the checkpoint from which the run resumes; None starts a new record. Lines of later steps
    are removed, since those steps will be taken again. So that a kill loses no line, log step N before saving the
    checkpoint of step N. console: where progress is shown; None is standard output. A terminal gets a live line,
    anything else (a pipe, CI, nohup) plain lines. track: gets every row too. quiet: shows nothing on the console.
    clock: seconds since any origin, for the remaining time on the console. Raises DataError if the metrics.jsonl of a
    resumed run is damaged before its last line.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        total_steps: int,
        resume_step: int | None,
        console: Console | None = None,
        watch: Callable[[Mapping[str, float]], str | None] | None = None,
        track: Callable[[Mapping[str, float]], None] | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        _cut(path, resume_step)
        self._watch, self._track = watch, track
        if watch is not None and resume_step is not None:
            for row in read_metrics(folder):
                watch(row)
        # Line buffering: what was logged is with the operating system, and outlives a SIGKILL of this process.
        self._file = open(path, "a", buffering=1, encoding="utf-8", newline="\n")
        self._board = _open_board(folder / TENSORBOARD, 0 if resume_step is None else resume_step + 1)
        self._remaining = _Remaining(total_steps, clock)
        if console is None or quiet:
            console = SafeConsole(quiet=quiet)
        screen = _LiveScreen if console.is_interactive and not console.quiet else _PlainScreen
        self._screen = screen(console, total_steps, resume_step or 0)
        if self._board is None:
            self.note("no TensorBoard files: tensorboardX is not installed (pip install tensorboardX)")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of optimizer step `step` (counted from 1), all finite numbers.

        Raises JaxftError for a NaN or infinite value: JSON cannot express them, and a null would hide that the run has
        diverged. Raises TypeError for anything but a number, device arrays included.
        """
        row = self._record(step, metrics)
        self._screen.show(step, _headline(row) + self._remaining.after(step))
        self._warn(row)

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record held-out metrics after optimizer step `step` (0: before training). Raises as `step` does."""
        row = self._record(step, metrics)
        metrics_text = [f"{key} {value:.4f}" for key, value in row.items() if key != "step" and key not in TIMING_KEYS]
        self._screen.print("  ".join([f"eval at step {step}", *metrics_text]))
        self._warn(row)

    def _warn(self, row: Mapping[str, float]) -> None:
        if self._watch is not None and (warning := self._watch(row)) is not None:
            self.note(f"warning: {warning}")

    def note(self, text: str) -> None:
        """Print one line on the console; it is not recorded."""
        self._screen.print(text)

    def close(self) -> None:
        """Flush and close everything; harmless when called again."""
        self._screen.close()
        self._file.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        row = {"step": int(step)} | {key: _plain(key, value, step) for key, value in metrics.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._board is not None:
            self._board.write(row)
        if self._track is not None:
            self._track(row)
        return row


class NoLog:
    """The log of all processes but the first: it records nothing."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a run folder's metrics.jsonl, oldest first; an incomplete last line is left out.

    Raises DataError if the file is absent, or damaged before its last line.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise DataError(f"no {METRICS} in {str(folder)!r}: it is not a run folder, or training never started there")
    return _read(path)


def _read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            readable = isinstance(row, dict) and isinstance(row.get("step"), int)
        except ValueError:
            readable = False
        if readable:
            rows.append(row)
        elif number < len(lines):
            raise DataError(
                f"{path} line {number} of {len(lines)} is not a JSON object with a step: the file is damaged. "
                "Mend or delete that line, or move the file away."
            )
    return rows


def _cut(path: Path, resume_step: int | None) -> None:
    """Removes the lines of steps after the checkpoint at resume_step."""
    rows = _read(path) if path.exists() else []
    kept = [] if resume_step is None else [row for row in rows if row["step"] <= resume_step]
    # Atomic, so that a kill in this moment loses nothing.
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))


def _plain(key: str, value: Any, step: int) -> int | float:
    """A Python number from a Python or numpy number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"metric {key!r} at step {step} is a {type(value).__name__}, not a number; use jax.device_get")
    if isinstance(value, numbers.Integral):
        return int(value)
    if not math.isfinite(value):
        raise JaxftError(
            f"metric {key!r} is {float(value)} at step {step}: training has diverged. "
            "Lower optim.learning_rate, set optim.clip_norm, or look at the rows of that step."
        )
    return float(value)


def _open_board(folder: Path, first_step: int) -> "_Board | None":
    """The TensorBoard writer, or None if tensorboardX is not installed."""
    try:
        return _Board(folder, first_step)
    except ImportError:
        return None


class _Board:
    """A TensorBoard event file, written at once.

    tensorboardX's SummaryWriter hands events to a thread, and its flush does not wait for them: a kill would
    leave a hole before the step from which the run resumes. So its event writer is used directly.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._Event, self._Summary = Event, Summary
        folder.mkdir(exist_ok=True)
        # The suffix keeps a run restarted within the same second from overwriting its own file.
        self._writer = EventsWriter(str(folder / "events"), f".from{first_step}")
        # A session start makes readers forget what an earlier file holds from first_step on.
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, row: Mapping[str, float]) -> None:
        values = [self._Summary.Value(tag=k, simple_value=v) for k, v in row.items() if k != "step"]
        event = self._Event(wall_time=time.time(), step=row["step"], summary=self._Summary(value=values))
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _headline(row: Mapping[str, float]) -> list[str]:
    """Loss, learning rate and speed, for the console."""
    parts = []
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "reward" in row:
        parts.append(f"reward {row['reward']:.3f}")
    if "learning_rate" in row:
        parts.append(f"lr {row['learning_rate']:.1e}")
    if "tokens_per_second" in row:
        rate = row["tokens_per_second"]
        parts.append(f"{rate:,.0f} tok/s" if rate >= 10 else f"{rate:.1f} tok/s")
    return parts


class _Remaining:
    """Time left, from the pace since the first logged step (the time before it is mostly compilation)."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self._total_steps, self._clock = total_steps, clock
        self._first: tuple[int, float] | None = None

    def after(self, step: int) -> list[str]:
        """`["2:31 left"]`, or [] if the pace is not known yet or no step is left."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if step <= first_step or step >= self._total_steps:
            return []
        seconds = round((self._total_steps - step) * (now - first_time) / (step - first_step))
        hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
        return [f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left"]


class _PlainScreen:
    """A line per logged step, for files and pipes."""

    def __init__(self, console: Console, total_steps: int, done_steps: int) -> None:
        self._console, self._total_steps = console, total_steps

    def show(self, step: int, parts: list[str]) -> None:
        self.print("  ".join([f"step {step}/{self._total_steps}", *parts]))

    def print(self, text: str) -> None:
        say(self._console, text)

    def close(self) -> None:
        pass


class _LiveScreen:
    """A progress line that stays at the bottom of a terminal; other text scrolls above it."""

    def __init__(self, console: Console, total_steps: int, done_steps: int) -> None:
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[metrics_text]}", markup=False),
        )
        # Only twice a second, because the thread that draws takes time from the training step.
        self._progress = Progress(*columns, console=console, refresh_per_second=2)
        self._task = self._progress.add_task("train", total=total_steps, completed=done_steps, metrics_text="compiling")
        self._progress.start()

    def show(self, step: int, parts: list[str]) -> None:
        self._progress.update(self._task, completed=step, metrics_text="  ".join(parts))

    def print(self, text: str) -> None:
        say(self._progress.console, text)

    def close(self) -> None:
        self._progress.stop()
