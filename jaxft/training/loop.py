"""The training loop: take a batch, step, log, evaluate, save."""

# B batch, S sequence

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxft.errors import JaxftError, Preempted
from jaxft.training.log import NoLog, RunLog
from jaxft.training.state import TrainState


class DivergedError(JaxftError):
    """The loss is no longer a number."""


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """When things happen, in steps; None: only after the last one."""

    total_steps: int
    steps_per_epoch: float
    log_every: int
    eval_every: int | None
    save_every: int | None

    def due(self, step: int, every: int | None) -> bool:
        """Whether something with this period is due after `step` steps."""
        return step == self.total_steps or (every is not None and step % every == 0)


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop calls, so that it knows neither files nor devices.

    train_step: jitted. batch(step): the batch on its devices. evaluate(state): held-out figures, or
    None where there are no held-out rows. save(step, state, progress, metrics). preempted(): asked after
    every step, whether to save and leave. figures(step): what the log says besides of the data seen in
    so many steps; None: nothing.
    """

    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    batch: Callable[[int], Any]
    evaluate: Callable[[TrainState], dict[str, float]] | None
    save: Callable[[int, TrainState, dict[str, float], dict[str, float]], None]
    preempted: Callable[[], bool]
    figures: Callable[[int], dict[str, float]] | None = None


def fit(
    state: TrainState, hooks: Hooks, cadence: Cadence, log: RunLog | NoLog, *, start: int, progress: dict[str, float]
) -> tuple[TrainState, dict[str, float]]:
    """Trains from step `start` to the last one. Returns the state and the last held-out figures.

    progress: sums since step 0 (`num_tokens`), as saved. Raises Preempted after saving; DivergedError
    at the first loss that is not a number, before it can reach a checkpoint.
    """
    progress, figures = dict(progress), {}
    window = Window()
    for step in range(start + 1, cadence.total_steps + 1):
        began = time.monotonic()
        state, metrics = hooks.train_step(state, hooks.batch(step - 1))
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        _check_finite(step, metrics)
        window.add(time.monotonic() - began, metrics["num_tokens"])
        progress["num_tokens"] = progress.get("num_tokens", 0.0) + metrics.pop("num_tokens")
        progress["trained_tokens"] = progress.get("trained_tokens", 0.0) + metrics.pop("trained_tokens")
        if cadence.due(step, cadence.log_every):
            seen = progress | {"epoch": step / cadence.steps_per_epoch}
            seen |= hooks.figures(step) if hooks.figures is not None else {}
            log.step(step, metrics | seen | window.rates())
        figures = {}  # those of an earlier step must not rank this step's checkpoint
        if hooks.evaluate is not None and cadence.due(step, cadence.eval_every):
            began = time.monotonic()
            figures = hooks.evaluate(state)
            log.eval(step, figures | {"eval_seconds": time.monotonic() - began})
        stopping = hooks.preempted()
        if stopping or cadence.due(step, cadence.save_every):
            hooks.save(step, state, progress, figures)
        if stopping and step < cadence.total_steps:
            raise Preempted(step)
    return state, figures


class Window:
    """Rates over the steps since the last time they were asked for: the steps alone, not evaluation or saving."""

    def __init__(self) -> None:
        self._seconds, self._steps, self._tokens = 0.0, 0, 0.0
        self._compiled = False

    def add(self, seconds: float, tokens: float) -> None:
        """One step more. The first one compiles, so it is not counted."""
        if self._compiled:
            self._seconds, self._steps, self._tokens = self._seconds + seconds, self._steps + 1, self._tokens + tokens
        self._compiled = True

    def rates(self) -> dict[str, float]:
        """tokens_per_second and step_seconds, and a new window; nothing where no step was counted."""
        seconds, steps, tokens = self._seconds, self._steps, self._tokens
        self._seconds, self._steps, self._tokens = 0.0, 0, 0.0
        return {"tokens_per_second": tokens / seconds, "step_seconds": seconds / steps} if steps else {}


def _check_finite(step: int, metrics: dict[str, float]) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise DivergedError(
            f"{', '.join(bad)} is not finite at step {step} (loss {metrics['loss']}, grad_norm "
            f"{metrics['grad_norm']}): lower optim.learning_rate, set optim.clip_norm, or train in float32. "
            "Earlier checkpoints are untouched."
        )
