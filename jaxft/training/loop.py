"""The training loop: take a batch, step, log, evaluate, save.

On accelerators a step is dispatched before the metrics of the one before are fetched, so that the host makes a batch
while the devices work. Before anything that depends on a step (an evaluation, a checkpoint, the end) its metrics are
fetched and checked.
"""

# B batch, S sequence

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from jaxft.errors import JaxftError, Preempted
from jaxft.training.early_stopping import EarlyStopping
from jaxft.training.goodput import Part, TimeUse
from jaxft.training.log import NoLog, RunLog
from jaxft.training.spikes import SpikeGuard
from jaxft.training.state import TrainState

UNEVALUATED = "unevaluated"  # in the progress of a step that was saved within its evaluation
# Metrics of a step whose sums since step 0 are logged. Steps that may skip their update, or tell spikes, have the last.
ADDED_UP = ("num_tokens", "trained_tokens", "skipped_updates", "spikes")


class DivergedError(JaxftError):
    """The loss, or another metric of a step, is NaN or infinite."""


@dataclass(frozen=True)
class Epochs:
    """A period in epochs, or in a part of one: it ends with the step in which so many are completed."""

    count: float


Period = int | Epochs | None


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """Periods in steps or epochs; None means only after the last step."""

    total_steps: int
    steps_per_epoch: float
    log_every: Period
    eval_every: Period
    save_every: Period

    def due(self, step: int, every: Period) -> bool:
        """Whether an event with this period is due after `step` steps."""
        if isinstance(every, Epochs):
            # Rounded: a third of 30 steps is a hair below 10.
            before, after = (
                math.floor(round(done / (self.steps_per_epoch * every.count), 6)) for done in (step - 1, step)
            )
            return step == self.total_steps or after > before
        return step == self.total_steps or (every is not None and step % every == 0)


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """The functions that the loop calls. The loop itself uses neither files nor devices.

    train_step: jitted. batch(state, step): the batch of step number `step`, counted from 0, on its devices; a method
    that generates its own data reads the weights in `state`. evaluate(state, between): held-out metrics; it calls
    `between` before every batch, and lets its errors through; None if no rows are held out. save(step, state, progress,
    metrics): writes a checkpoint. preempted(): called after every step; whether to save and stop; called within
    evaluations too. may_stop(step): whether a run can go on from a checkpoint after `step` steps; if not, it saves and
    stops at the next step that may. early_stopping: ends training before the last step; None: nothing does. spikes:
    tells spikes, for which the step is given their limits; None: it is called without them. data_metrics(step): values
    to log about the data of the first `step` steps. evaluate_start: whether a run that has not begun is evaluated
    before its first step. evaluated(): called after the metrics of an evaluation are logged. times: is told what takes
    time. batch_part: what `batch` counts for there. ahead: whether a step is dispatched while the devices still work on
    the one before; `batch` must then not depend on its weights, nor spikes be told.
    """

    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    batch: Callable[[TrainState, int], Any]
    evaluate: Callable[[TrainState, Callable[[], None]], dict[str, float]] | None
    save: Callable[[int, TrainState, dict[str, Any], dict[str, float]], None]
    preempted: Callable[[], bool]
    may_stop: Callable[[int], bool] = lambda step: True
    early_stopping: EarlyStopping | None = None
    spikes: SpikeGuard | None = None
    data_metrics: Callable[[int], dict[str, float]] = lambda step: {}
    evaluate_start: bool = False
    evaluated: Callable[[], object] = lambda: None
    times: TimeUse = field(default_factory=TimeUse)
    batch_part: Part = "input"
    ahead: bool = False


def fit(
    state: TrainState, hooks: Hooks, cadence: Cadence, log: RunLog | NoLog, *, start: int, progress: dict[str, Any]
) -> tuple[TrainState, dict[str, float]]:
    """Trains from step `start` to the last one. Returns the state and the held-out metrics of the last step.

    progress: sums since step 0 of the metrics in ADDED_UP, and what `hooks.early_stopping` and `hooks.spikes` have
    seen, as saved; and UNEVALUATED if the evaluation of step `start` was interrupted, which then comes first. If early
    stopping ends training, the last step is an earlier one, and is saved. Raises Preempted after saving, SpikeError for
    a spike that ends training, after saving the step before it, and DivergedError at the first loss that is not a
    number and whose update is made, before it can reach a checkpoint.
    """
    progress = dict(progress)
    held_out: dict[str, float] = {}
    window = Window()
    taken: list[_Taken] = []  # steps whose metrics are not fetched yet

    def settle(count: int = 0) -> None:
        """Fetches the metrics of all steps but the last `count`."""
        while len(taken) > count:
            _settle(hooks, cadence, taken.pop(0), state, progress, window, log)

    if start == 0 and hooks.evaluate_start:
        evaluate(hooks, state, 0, log)
    if UNEVALUATED in progress:
        ending, held_out = _finish(hooks, cadence, start, state, progress, log, settle)
        if ending:
            return state, held_out
    for step in range(start + 1, cadence.total_steps + 1):
        started = hooks.times.clock()
        with hooks.times.during(hooks.batch_part):
            batch = hooks.batch(state, step - 1)
        ready = hooks.times.clock()
        if taken and taken[-1].is_running:
            hooks.times.hide(hooks.batch_part, ready - started)
        limits = () if hooks.spikes is None else (hooks.spikes.limits(progress),)
        with hooks.times.during("compile" if step == start + 1 else "steps"):
            state, metrics = hooks.train_step(state, batch, *limits)
            taken.append(_Taken(step, metrics, started, ready))
            if step == start + 1:
                jax.block_until_ready(metrics)
        settle(1 if hooks.ahead and taken[-1].is_running else 0)
        ending, held_out = _finish(hooks, cadence, step, state, progress, log, settle)
        if ending:
            break
    return state, held_out


def _finish(
    hooks: Hooks,
    cadence: Cadence,
    step: int,
    state: TrainState,
    progress: dict[str, Any],
    log: RunLog | NoLog,
    settle: Callable[[], None],
) -> tuple[bool, dict[str, float]]:
    """Evaluates and saves after a step. Returns whether training ends with it, and its held-out metrics.

    A step that is saved already, but was not evaluated, is ranked by its metrics then. Raises Preempted.
    """
    again = progress.pop(UNEVALUATED, False)
    held_out: dict[str, float] = {}  # metrics of an earlier step must not rank this step's checkpoint
    if cadence.due(step, cadence.eval_every):
        settle()
        held_out = _evaluate_or_save(hooks, state, step, log, progress)
    ending = _ends_early(hooks, step, held_out, progress)
    # Every process asks after the same steps.
    with hooks.times.during("peers"):
        stopping = hooks.may_stop(step) and hooks.preempted()
    if stopping or ending or again or cadence.due(step, cadence.save_every):
        settle()
        if ending and not held_out:
            held_out = _evaluate_or_save(hooks, state, step, log, progress)
        with hooks.times.during("save"):
            hooks.save(step, state, progress, held_out)
    if stopping and not ending and step < cadence.total_steps:
        raise Preempted(step)
    return ending, held_out


class _Taken(NamedTuple):
    """A step that was dispatched. started, ready: when its batch was begun and done, in seconds of the clock."""

    step: int
    metrics: dict[str, jax.Array]
    started: float
    ready: float

    @property
    def is_running(self) -> bool:
        """Whether the devices still work on it."""
        arrays: list[Any] = [value for value in self.metrics.values() if isinstance(value, jax.Array)]
        return not all(array.is_ready() for array in arrays)


def _settle(
    hooks: Hooks,
    cadence: Cadence,
    taken: _Taken,
    state: TrainState,
    progress: dict[str, Any],
    window: "Window",
    log: RunLog | NoLog,
) -> None:
    """Fetches the metrics of a step, checks and logs them. state: after the newest step."""
    with hooks.times.during("steps"):
        metrics = {name: float(value) for name, value in jax.device_get(taken.metrics).items()}
    step, now = taken.step, hooks.times.clock()
    if hooks.spikes is not None:
        metrics = _watched(hooks, hooks.spikes, step, state, metrics, progress, log)
    _check_finite(step, metrics)
    window.add(taken.started, taken.ready, now, metrics["num_tokens"])
    for name in [name for name in ADDED_UP if name in metrics]:
        progress[name] = progress.get(name, 0.0) + metrics.pop(name)
    if cadence.due(step, cadence.log_every):
        consumed = {name: progress[name] for name in ADDED_UP if name in progress}
        consumed |= {"epoch": step / cadence.steps_per_epoch} | hooks.data_metrics(step)
        log.step(step, metrics | consumed | window.rates() | hooks.times.metrics())


def _watched(
    hooks: Hooks,
    guard: SpikeGuard,
    step: int,
    state: TrainState,
    metrics: dict[str, float],
    progress: dict[str, Any],
    log: RunLog | NoLog,
) -> dict[str, float]:
    """The metrics of a step after the guard has seen them: of a step without its update, those that are finite."""
    described = guard.describe(step, metrics, progress) if metrics["spikes"] else ""
    if described and guard.mode == "stop":
        may_save = step > 1 and hooks.may_stop(step - 1)
        if may_save:
            hooks.save(step - 1, state, progress, {})
        raise guard.stopped(step, described, f"step {step - 1} is saved" if may_save else "earlier steps are untouched")
    guard.add(step, metrics, progress)
    if not described:
        return metrics
    log.note(f"warning: {described}{'; its update is left out' if guard.mode == 'skip' else ''}")
    if guard.mode == "skip":
        return {name: value for name, value in metrics.items() if math.isfinite(value)}
    return metrics


def _ends_early(hooks: Hooks, step: int, held_out: dict[str, float], progress: dict[str, float]) -> bool:
    """Whether training ends after a step. held_out: its metrics, which are added to `progress`; none if not due."""
    if hooks.early_stopping is None:
        return False
    if held_out:
        hooks.early_stopping.add(held_out, progress)
    return hooks.early_stopping.ends(progress) and hooks.may_stop(step)


def _evaluate_or_save(
    hooks: Hooks, state: TrainState, step: int, log: RunLog | NoLog, progress: dict[str, Any]
) -> dict[str, float]:
    """As `evaluate`. Before it raises Preempted, the step is saved as one that is still to be evaluated."""
    try:
        return evaluate(hooks, state, step, log)
    except Preempted:
        with hooks.times.during("save"):
            hooks.save(step, state, progress | {UNEVALUATED: True}, {})
        raise


def evaluate(hooks: Hooks, state: TrainState, step: int, log: RunLog | NoLog) -> dict[str, float]:
    """The held-out metrics, which are logged; none if no rows are held out. Raises Preempted between two batches."""
    if hooks.evaluate is None:
        return {}

    def between() -> None:
        if hooks.may_stop(step) and hooks.preempted():
            raise Preempted(step)

    started = hooks.times.clock()
    with hooks.times.during("evaluation"):
        held_out = hooks.evaluate(state, between)
    log.eval(step, held_out | {"eval_seconds": hooks.times.clock() - started})
    hooks.evaluated()
    return held_out


class Window:
    """Training speed since the last call of `rates`. Only steps count, not evaluation or saving."""

    def __init__(self) -> None:
        self._seconds, self._update_seconds, self._steps, self._tokens = 0.0, 0.0, 0, 0.0
        self._ended: float | None = None

    def add(self, started: float, ready: float, ended: float, tokens: float) -> None:
        """Adds one step, which may have begun before the one before ended. The first step includes compilation, so it
        is not counted.

        started, ready, ended: when its batch was begun, its batch was done, and its metrics were there, in seconds.
        """
        if self._ended is not None:
            self._seconds += ended - max(self._ended, started)
            self._update_seconds += ended - max(self._ended, ready)
            self._steps, self._tokens = self._steps + 1, self._tokens + tokens
        self._ended = ended

    def rates(self) -> dict[str, float]:
        """tokens_per_second, step_seconds and update_seconds, after which the window is empty.

        {} if no step was counted, or the clock has not moved.
        """
        seconds, update_seconds, steps, tokens = self._seconds, self._update_seconds, self._steps, self._tokens
        self._seconds, self._update_seconds, self._steps, self._tokens = 0.0, 0.0, 0, 0.0
        if not steps or not seconds:
            return {}
        return {
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds / steps,
            "update_seconds": update_seconds / steps,
        }


def _check_finite(step: int, metrics: dict[str, float]) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise DivergedError(
            f"{', '.join(bad)} is not finite at step {step} (loss {metrics['loss']}, grad_norm "
            f"{metrics['grad_norm']}), and nothing of this step is saved. Earlier checkpoints are untouched. The same "
            "command with train.on_spike='skip' goes on from the newest and leaves such updates out; or train into "
            "another output_dir with a lower optim.learning_rate, with optim.clip_norm, or in float32."
        )
