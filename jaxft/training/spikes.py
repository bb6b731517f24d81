"""Spikes: steps whose loss or gradient is far above those of the steps before, and what a run does about them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxft.errors import JaxftError

OnSpike = Literal["off", "warn", "skip", "stop"]
MEASURED = ("loss", "grad_norm")
# Standard deviation of normally distributed values, in units of their median absolute deviation.
NORMAL = 1.4826
LEAST_DEVIATION = 0.01  # of the median: steps that are nearly equal do not make the next one a spike
MOST_LOST = 10  # updates that are not finite, in a row


class SpikeError(JaxftError):
    """A run ends because of a spike, as `train.on_spike` says."""


@dataclass(frozen=True, kw_only=True)
class SpikeGuard:
    """Tells spikes by the last steps.

    A loss or gradient norm is a spike if it lies more than `threshold` robust standard deviations above the median of
    the last `window` steps (`limit`). Before so many steps there is none, but for numbers that are NaN or infinite.
    What it has seen is in the `progress` of a run, which checkpoints keep, so that a resumed run decides alike; all
    processes see the same numbers. mode: `warn` makes the update and counts, `skip` leaves it out, `stop` ends the run
    before it. by_loss: whether the loss is looked at; that of methods on rewards says nothing, since it is near 0.
    """

    mode: OnSpike
    threshold: float
    window: int
    by_loss: bool = True

    SEEN = "spikes/seen"  # entry of `progress`: by name, the values of the last steps
    LOST = "spikes/lost"  # entry of `progress`: updates in a row that were not finite

    def limits(self, progress: dict[str, Any]) -> np.ndarray:
        """The largest loss and gradient norm of the next step that are no spike, float32 [2]."""
        seen = progress.get(self.SEEN, {})
        limits = [limit(seen.get(name, []), self.threshold, self.window) for name in MEASURED]
        return np.array(limits if self.by_loss else [math.inf, *limits[1:]], np.float32)

    def add(self, step: int, metrics: dict[str, float], progress: dict[str, Any]) -> None:
        """Adds a step to `progress`, unless nothing was trained. Spikes are added too: a level that stays high is no
        spike for long.

        Raises SpikeError if no update could be made for a long time.
        """
        if metrics["trained_tokens"] == 0:
            return
        seen = progress.setdefault(self.SEEN, {name: [] for name in MEASURED})
        values = [metrics[name] for name in MEASURED]
        if np.isfinite(values).all():
            progress[self.SEEN] = {
                name: [*seen[name], value][-self.window :] for name, value in zip(MEASURED, values, strict=True)
            }
            progress[self.LOST] = 0.0
            return
        progress[self.LOST] = progress.get(self.LOST, 0.0) + 1
        if progress[self.LOST] >= MOST_LOST:
            raise SpikeError(
                f"the loss or the gradient was not finite in {MOST_LOST} steps in a row, up to step {step}: this is no "
                "spike. Earlier checkpoints are untouched. Train into another output_dir with a lower "
                "optim.learning_rate or in float32, or look at the rows of these steps."
            )

    def describe(self, step: int, metrics: dict[str, float], progress: dict[str, Any]) -> str:
        """What was seen, for people. progress: before the step."""
        limits = self.limits(progress)
        parts = [
            f"{name} {metrics[name]:.4g}, at most {most:.4g} expected"
            for name, most in zip(MEASURED, limits, strict=True)
            if not metrics[name] <= most or not np.isfinite(metrics[name])
        ]
        return f"spike at step {step}: {'; '.join(parts) or 'the weights after the update would not be finite'}"

    def stopped(self, step: int, described: str, saved: str) -> SpikeError:
        """The error that ends a run with `stop`. saved: which step is."""
        return SpikeError(
            f"{described}. The update was not made, because of train.on_spike='stop'; {saved}. Look at the rows of "
            "this step. The same command with train.on_spike='skip' goes on without this update, and with 'warn' makes "
            "it."
        )


def limit(values: Sequence[float], threshold: float, window: int) -> float:
    """The largest value that is no spike after these: their median + threshold * deviation.

    deviation: 1.4826 times the median absolute deviation from the median, but at least 1% of the median's size.
    Infinite for fewer than `window` values, and if most of them are 0.
    """
    if len(values) < window:
        return math.inf
    median = float(np.median(values))
    deviation = NORMAL * float(np.median(np.abs(np.asarray(values) - median)))
    deviation = max(deviation, LEAST_DEVIATION * abs(median))
    return median + threshold * deviation if deviation else math.inf
