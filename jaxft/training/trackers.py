"""Trackers of experiments, Weights & Biases, MLflow and Trackio, each through its own library.

They get the metrics of metrics.jsonl under the same names. A run that is resumed goes on in the tracker's run of the
same id. A tracker that fails is told of and ends nothing.
"""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

from jaxft.errors import ConfigError, Preempted

PROJECT = "jaxft"
MOST_FAILURES = 3  # in a row, after which a tracker is not called again
MOST_PARAMS = 100  # that MLflow takes at a time
LONGEST_PARAM = 6000  # characters of a value, for MLflow


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """What trackers know of a run. id: the same when it is resumed. values: its settings and digests, by key."""

    id: str
    name: str
    values: Mapping[str, Any]


class Tracker(Protocol):
    """One tracker, whose run has begun."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a step."""

    def finish(self, step: int, summary: Mapping[str, float], *, failed: bool) -> None:
        """Records the last figures and ends the tracker's run."""


class _Wandb:
    """Weights & Biases. WANDB_PROJECT, WANDB_MODE and its other variables are read by its library."""

    def __init__(self, library: Any, run: Tracked) -> None:
        self._run = library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.name,
            resume="allow",
            config=dict(run.values),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, step: int, summary: Mapping[str, float], *, failed: bool) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=int(failed))


class _MLflow:
    """MLflow. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are read. Its server gives runs ids of its own, so ours is
    a tag by which the run is looked up."""

    TAG = "jaxft_run_id"

    def __init__(self, library: Any, run: Tracked) -> None:
        self._library = library
        experiment = library.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        earlier = library.search_runs(
            experiment_ids=[experiment.experiment_id],
            filter_string=f"tags.{self.TAG} = '{run.id}'",
            max_results=1,
            output_format="list",
        )
        if earlier:
            library.start_run(run_id=earlier[0].info.run_id)
            return
        library.start_run(run_name=run.name, tags={self.TAG: run.id})
        params = [(key, str(value)[:LONGEST_PARAM]) for key, value in run.values.items()]
        for start in range(0, len(params), MOST_PARAMS):
            library.log_params(dict(params[start : start + MOST_PARAMS]))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._library.log_metrics(dict(metrics), step=step)

    def finish(self, step: int, summary: Mapping[str, float], *, failed: bool) -> None:
        self._library.log_metrics(dict(summary), step=step)
        self._library.end_run("FAILED" if failed else "FINISHED")


class _Trackio:
    """Trackio, whose runs are known by their names."""

    def __init__(self, library: Any, run: Tracked) -> None:
        self._run = library.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.name}-{run.id[:8]}",
            resume="allow",
            config=dict(run.values),
        )
        self._library = library

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._library.log(dict(metrics), step=step)

    def finish(self, step: int, summary: Mapping[str, float], *, failed: bool) -> None:
        self._library.log(dict(summary), step=step)
        self._library.finish()


TRACKERS: dict[str, Callable[[Any, Tracked], Tracker]] = {"wandb": _Wandb, "mlflow": _MLflow, "trackio": _Trackio}


def require(names: Sequence[str]) -> None:
    """Imports the libraries of trackers. Raises ConfigError, with the command that installs it, for an absent one."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"train.report_to={','.join(names)!r} needs the library {name}, which cannot be imported ({error}). "
                f'Install it: pip install "jaxft[{name}]", or leave {name} out'
            ) from error


class Trackers:
    """The trackers of a run; a context manager, which ends them with the run.

    warn: told of a tracker that fails; the run goes on without it.
    """

    def __init__(self, names: Sequence[str], run: Tracked, warn: Callable[[str], None]) -> None:
        self._warn, self._step = warn, 0
        self._summary: dict[str, float] = {}
        self._open: dict[str, Tracker] = {}
        self._failures = dict.fromkeys(names, 0)
        for name in names:
            self._try(name, partial(self._begin, name, run))

    def _begin(self, name: str, run: Tracked) -> None:
        self._open[name] = TRACKERS[name](importlib.import_module(name), run)

    def log(self, row: Mapping[str, float]) -> None:
        """Records a row of metrics.jsonl."""
        self._step = int(row["step"])
        metrics = {key: float(value) for key, value in row.items() if key != "step"}
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, self._step, metrics))

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Keeps the numbers of a summary for the end."""
        numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
        self._summary = {key: float(value) for key, value in numbers.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that was preempted goes on later.
        failed = error is not None and not isinstance(error, Preempted)
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.finish, self._step, self._summary, failed=failed))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except (Exception, SystemExit) as error:
            self._failures[name] += 1
            if self._failures[name] == 1:
                self._warn(f"warning: {name} failed and the run goes on: {type(error).__name__}: {error}")
            if self._failures[name] >= MOST_FAILURES and self._open.pop(name, None) is not None:
                self._warn(f"warning: {name} failed {MOST_FAILURES} times in a row and gets no more metrics")
        else:
            self._failures[name] = 0
