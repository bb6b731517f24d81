"""What watches a run from outside: a program that shows its phases and takes its checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Export = Callable[[int, Callable[[Path], None]], None]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Functions that a run calls, in process 0 alone.

    phase: with the name of what begins: loading, scoring, training, exporting. export: with the step of a checkpoint
    that is not the last, and a function that writes the weights of that step into an empty folder, as the run's own
    export is written; called also when a run goes on from such a step. None: the run writes its last export alone.
    """

    phase: Callable[[str], None] = lambda name: None
    export: Export | None = None
