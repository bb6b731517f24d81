"""Run logging: metrics.jsonl, TensorBoard event files and the console."""

import json
import math
import numbers
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from jaxft.errors import DataError, JaxftError
from jaxft.files.atomic import write_text
from jaxft.files.json_fields import is_finite
from jaxft.files.lines import LineFile
from jaxft.files.run_folder import METRICS, TENSORBOARD
from jaxft.terminal.console import SafeConsole
from jaxft.terminal.output import lasting
from jaxft.training import goodput
from jaxft.training.screens import LiveScreen, PlainScreen, Remaining, headline
from jaxft.training.tensorboard import TensorBoard

# Keys whose values come from a clock: two runs that are equal in every other key are the same run.
TIMING_KEYS = (
    "tokens_per_second", "step_seconds", "eval_seconds", "elapsed_seconds", "update_seconds", "rollout_seconds",
    "reward_seconds", "rollout_tokens_per_second", *goodput.KEYS,
)  # fmt: skip


EVALUATED = "eval_seconds"  # in the rows of evaluations alone


class RunLog:
    """Writes the metrics of a run; a context manager. Neither a disk nor a console that fails ends the run.

    folder: the run folder, made if absent. It gets `metrics.jsonl`, one JSON object a line, and, if tensorboardX is
    installed, `tensorboard/`. Both use the keys of `metrics` as they are. total_steps: optimizer steps of the whole
    run. resume_step: step of the checkpoint from which the run resumes; None starts a new record. Lines of later steps
    are removed, since those steps will be taken again, and with unevaluated its evaluation too. So that a kill loses no
    line, log step N before saving the checkpoint of step N. console: where progress is shown; None is standard output.
    A terminal gets a live line, anything else (a pipe, CI, nohup) plain lines. track: gets every row too. quiet: shows
    nothing on the console. clock: seconds since any origin, for the remaining time on the console. Raises DataError if
    the metrics.jsonl of a resumed run is damaged before its last line.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        total_steps: int,
        resume_step: int | None,
        unevaluated: bool = False,
        console: Console | None = None,
        watch: Callable[[Mapping[str, float]], str | None] | None = None,
        track: Callable[[Mapping[str, float]], None] | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        self.rows = _cut(path, resume_step, unevaluated=unevaluated)  # in the file
        self._watch, self._track = watch, track
        if watch is not None and resume_step is not None:
            for row in read_metrics(folder):
                watch(row)
        self._remaining = Remaining(total_steps, clock)
        if console is None or quiet:
            console = SafeConsole(quiet=quiet)
        lasting(console)
        screen = LiveScreen if console.is_interactive and not console.quiet else PlainScreen
        self._screen = screen(console, total_steps, resume_step or 0)
        self._file = LineFile(path, self.note)
        self._board = TensorBoard(folder / TENSORBOARD, 0 if resume_step is None else resume_step + 1, self.note)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of optimizer step `step` (counted from 1), all finite numbers.

        Raises JaxftError for a NaN or infinite value: JSON cannot express them, and a null would hide that the run has
        diverged. Raises TypeError for anything but a number, device arrays included.
        """
        row = self._record(step, metrics)
        self._screen.show(step, headline(row) + self._remaining.after(step))
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
        self._file.close()
        self._board.close()
        self._screen.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        row = {"step": int(step)} | {key: _plain(key, value, step) for key, value in metrics.items()}
        self._file.add([json.dumps(row, allow_nan=False) + "\n"])
        self.rows += 1
        self._board.write(row)
        if self._track is not None:
            self._track(row)
        return row


class NoLog:
    """The log of all processes but the first: it records nothing."""

    rows = 0

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
            readable = isinstance(row, dict) and isinstance(row.get("step"), int) and all(map(_is_finite, row.values()))
        except (ValueError, RecursionError):
            readable = False
        if readable:
            rows.append(row)
        elif number < len(lines):
            raise DataError(
                f"{path} line {number} of {len(lines)} is not a JSON object with a step and finite numbers: the file "
                "is damaged. Mend or delete that line, or move the file away."
            )
    return rows


def spans(steps: Sequence[int]) -> list[str]:
    """Ascending numbers in short: those with equal distances as `10 to 90 by 10`, `3 to 7`, a single one as `12`."""
    out, at = [], 0
    while at < len(steps):
        stop = at + 1
        stride = steps[stop] - steps[at] if stop < len(steps) else 1
        while stop < len(steps) and steps[stop] - steps[stop - 1] == stride:
            stop += 1
        by = "" if stride == 1 else f" by {stride}"
        out.append(str(steps[at]) if stop == at + 1 else f"{steps[at]} to {steps[stop - 1]}{by}")
        at = stop
    return out


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)


def evaluations(folder: str | os.PathLike[str]) -> dict[int, dict[str, float]]:
    """The held-out metrics in a run folder's metrics.jsonl, by step; none if there is no such file."""
    path = Path(folder) / METRICS
    rows = [row for row in (_read(path) if path.is_file() else []) if EVALUATED in row]
    return {row["step"]: {name: row[name] for name in row if name not in ("step", EVALUATED)} for row in rows}


def _cut(path: Path, resume_step: int | None, *, unevaluated: bool) -> int:
    """Removes the lines of steps after the checkpoint at resume_step; returns the number of those that stay.

    unevaluated: whether its evaluation is removed too.
    """
    rows = _read(path) if path.is_file() else []  # a pipe is not waited for
    kept = [] if resume_step is None else [row for row in rows if row["step"] <= resume_step]
    kept = [row for row in kept if not (unevaluated and row["step"] == resume_step and EVALUATED in row)]
    # Atomic, so that a kill in this moment loses nothing.
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
    return len(kept)


def _plain(key: str, value: Any, step: int) -> int | float:
    """A Python number from a Python or numpy number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"metric {key!r} at step {step} is a {type(value).__name__}, not a number; use jax.device_get")
    if isinstance(value, numbers.Integral):
        return int(value)
    if not math.isfinite(value):
        raise JaxftError(
            f"metric {key!r} is {float(value)} at step {step}: training has diverged. Earlier checkpoints are "
            "untouched. Look at the rows of that step; or train into another output_dir with a lower "
            "optim.learning_rate, with optim.clip_norm, or in float32."
        )
    return float(value)
