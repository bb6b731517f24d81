"""Watches the log-probabilities of chosen and rejected answers for the case in which both fall."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CHOSEN, REJECTED = "logps/chosen", "logps/rejected"
WINDOW = 10  # logged values whose means are compared, the first of a run with the last
SHARE = 0.05  # of the first mean's size: a smaller fall is none
STANDARD_ERRORS = 2.0  # of the difference of both means: a smaller fall may be chance


class FallingLikelihoods:
    """Says once if chosen answers become less likely together with rejected ones.

    Losses on pairs only widen the difference, so that both answers may lose likelihood, to the benefit of texts that
    nobody judged (arXiv:2402.13228). A log-probability has fallen if the mean of the last WINDOW logged values is below
    that of the first WINDOW by more than SHARE of the latter's size, and by more than STANDARD_ERRORS standard errors
    of the difference, since values of different answers vary. The windows do not overlap.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {CHOSEN: [], REJECTED: []}
        self._is_told = False

    def add(self, metrics: Mapping[str, Any]) -> str | None:
        """Adds a logged step. A warning, at the first step at which both have fallen; None at all others."""
        if not self._append(metrics) or self._is_told:
            return None
        warning = self._warning()
        self._is_told = warning is not None
        return warning

    @classmethod
    def warning_of(cls, rows: Iterable[Mapping[str, Any]]) -> str | None:
        """The warning about a whole run, whose logged steps are these: None if both have not fallen at its end."""
        run = cls()
        for row in rows:
            run._append(row)
        return run._warning()

    def _append(self, metrics: Mapping[str, Any]) -> bool:
        # 0 is logged for a batch that has no such answer.
        values = {name: metrics[name] for name in self._values if isinstance(metrics.get(name), int | float)}
        values = {name: value for name, value in values.items() if value != 0}
        if len(values) < len(self._values):
            return False
        for name, value in values.items():
            self._values[name].append(value)
        return True

    def _warning(self) -> str | None:
        chosen, rejected = (_fall(values) for values in self._values.values())
        if chosen is None or rejected is None:
            return None
        return (
            "chosen answers become less likely together with rejected ones: between the first and the last "
            f"{WINDOW} logged steps, the mean of {CHOSEN} fell from {chosen[0]:.4g} to {chosen[1]:.4g}, and that of "
            f"{REJECTED} from {rejected[0]:.4g} to {rejected[1]:.4g}. The model moves to answers that nobody judged. "
            "Add the likelihood of chosen answers to the loss or weigh it more (such as method.dpo.sft_weight), lower "
            "optim.learning_rate, or raise beta."
        )


def _fall(values: Sequence[float]) -> tuple[float, float] | None:
    """(first mean, last mean) if they are far enough apart; None if not, or if there are too few values."""
    if len(values) < 2 * WINDOW:
        return None
    first, last = values[:WINDOW], values[-WINDOW:]
    before, after = statistics.fmean(first), statistics.fmean(last)
    error = ((statistics.variance(first) + statistics.variance(last)) / WINDOW) ** 0.5
    return (before, after) if before - after > max(SHARE * abs(before), STANDARD_ERRORS * error) else None
