"""Ends training once a held-out metric has stopped getting better."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """metric: of the held-out metrics. mode: `min` or `max`, which values are better.

    patience: the number of evaluations in a row without a better value than ever before after which training ends.
    threshold: a change by no more than this is not better. What it has seen is in the `progress` of a run, which
    checkpoints keep, under names that begin with `PREFIX`.
    """

    PREFIX = "early_stopping/"

    metric: str
    mode: str
    patience: int
    threshold: float = 0.0

    def add(self, held_out: dict[str, float], progress: dict[str, float]) -> None:
        """Adds an evaluation to `progress`. A value that is no number is not better."""
        best, waiting = f"{self.PREFIX}{self.metric}/{self.mode}", f"{self.PREFIX}{self.metric}/waiting"
        value = held_out[self.metric]
        gain = progress.get(best, value) - value
        if self.mode == "max":
            gain = -gain
        if (best not in progress and value == value) or gain > self.threshold:
            progress |= {best: value, waiting: 0.0}
        else:
            progress[waiting] = progress.get(waiting, 0.0) + 1

    def ends(self, progress: dict[str, float]) -> bool:
        """Whether training ends, by the evaluations in `progress`."""
        return progress.get(f"{self.PREFIX}{self.metric}/waiting", 0.0) >= self.patience
