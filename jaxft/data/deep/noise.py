"""Rows whose answer may be wrong, as a model that did not see them tells."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A training row whose answer may be wrong, by a model that was trained on other rows.

    loss: of its answer, in nats per token. usual: the median of the rows with the same answer, or of all rows where
    answers are not from a short list. excess: what the rows are ranked by: loss - usual; or, if each answer of a short
    list was tried, the log-probability of the likeliest other one less that of its own. answer: its own. model: what
    the model answers.
    """

    row: int
    loss: float
    usual: float
    excess: float
    answer: str
    model: str | None = None
