"""What the sections of training methods have in common."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from jaxft.config.fields import Section


class MethodSection(Section):
    """The settings of one method.

    HELD_OUT_METRICS: the names of its held-out metrics, by which `checkpoint.best_metric` may rank. ROWS: the form of
    its rows: conversations, pairs (a chosen and a rejected answer), answers labelled good or bad, or prompts, which the
    model answers itself. `:smoke` runs take rows of this form.
    """

    HELD_OUT_METRICS: ClassVar[tuple[str, ...]] = ("eval_loss",)
    ROWS: ClassVar[Literal["conversations", "pairs", "labelled", "prompts"]] = "conversations"


@dataclass(frozen=True, kw_only=True)
class ReferenceSection(MethodSection):
    """The settings of a method that compares the model with a frozen reference."""

    reference: Annotated[
        Literal["auto", "cached"],
        "where the log-probabilities of the frozen reference come from. `auto`: from the model without its adapter, or "
        "from a frozen copy of all weights, in every step; `cached`: computed once before the first step and kept in "
        "the run folder",
    ] = "auto"
