"""What the sections of training methods have in common."""

from typing import ClassVar, Literal

from jaxft.config.fields import Section


class MethodSection(Section):
    """The settings of one method.

    HELD_OUT_METRICS: the names of its held-out metrics, by which `checkpoint.best_metric` may rank. ROWS: the form of
    its rows: conversations, pairs (a chosen and a rejected answer), or answers labelled good or bad. `:smoke` runs take
    rows of this form.
    """

    HELD_OUT_METRICS: ClassVar[tuple[str, ...]] = ("eval_loss",)
    ROWS: ClassVar[Literal["conversations", "pairs", "labelled"]] = "conversations"
