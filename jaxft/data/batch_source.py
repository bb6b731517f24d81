"""The interface by which a training loop takes batches, from one set or from several."""

from typing import Protocol

import numpy as np

from jaxft.data.batch import Batch


class BatchSource(Protocol):
    """Batches as a pure function of the step, so that a resumed run asks for its next step and replays nothing.

    `Loader` reads one set, `Mixture` several.
    """

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""

    @property
    def steps_per_epoch(self) -> float:
        """Steps that one pass over the data takes; not whole if the last batch of a pass runs into the next."""

    def epoch_of(self, step: int) -> float:
        """Epochs completed after the first `step` steps."""

    def batch(self, step: int, rows: slice | None = None) -> Batch[np.ndarray]:
        """The batch of a step, from 0, as numpy arrays [B, S].

        rows: return only these rows of it, for a process that feeds only its own devices.
        """

    def metrics(self, step: int) -> dict[str, float]:
        """Log values about the data consumed in the first `step` steps."""
