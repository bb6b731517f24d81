"""Hyperparameters of the protocol: their bounds, what `auto` becomes, and the settings of a run that they are.

The protocol counts a batch in rows. A run counts it in packed sequences, so rows are converted by how many of them the
examination found in a sequence.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxft.serving.http.bodies import positive_field, refuse_unknown, whole_field

AUTO = "auto"
EPOCHS, BATCH_ROWS, MULTIPLIER = 50, 256, 1e4
# Epochs where the job says `auto`: so many, but rows in all within these bounds. Source: the preparation of rows for
# chat fine-tuning in OpenAI's cookbook.
TARGET_EPOCHS, LEAST_ROWS, MOST_ROWS, AUTO_EPOCHS = 3, 100, 25_000, 25
BATCH_SEQUENCES, ENOUGH_STEPS = 16, 20  # a batch where the job says `auto`: the run's own, smaller for few rows
RATES = {"adapter": 2e-4, "none": 2e-5}  # peak learning rates by which the multiplier multiplies


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What a job requests; None is `auto`. batch_size: in rows."""

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None

    def shown(self) -> dict[str, Any]:
        """As the protocol has them."""
        return {name: AUTO if value is None else value for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the examination of the rows found. unit: of which a batch must be a multiple, in sequences."""

    rows: int
    sequences: int
    unit: int = 1


def parse_hyperparameters(values: Mapping[str, Any], within: str) -> Hyperparameters:
    """The hyperparameters of a request. Raises ApiError 400 for one that is unknown or outside of its bounds."""
    refuse_unknown(values, ("n_epochs", "batch_size", "learning_rate_multiplier"), within)
    given = {name: value for name, value in values.items() if value != AUTO}
    return Hyperparameters(
        n_epochs=whole_field(given, "n_epochs", 1, EPOCHS, within),
        batch_size=whole_field(given, "batch_size", 1, BATCH_ROWS, within),
        learning_rate_multiplier=positive_field(given, "learning_rate_multiplier", MULTIPLIER, within),
    )


def resolved(requested: Hyperparameters, counts: Counts) -> tuple[Hyperparameters, int]:
    """(the numbers in the place of `auto`, the batch in sequences)."""
    epochs = requested.n_epochs or auto_epochs(counts.rows)
    rows_of_one = counts.rows / counts.sequences
    if requested.batch_size is None:
        sequences = _auto_batch(counts, epochs)
        rows = max(1, min(BATCH_ROWS, round(sequences * rows_of_one)))
    else:
        rows = requested.batch_size
        wanted = max(1, round(rows / rows_of_one))
        sequences = math.ceil(min(wanted, counts.sequences) / counts.unit) * counts.unit
    multiplier = requested.learning_rate_multiplier or 1.0
    return Hyperparameters(n_epochs=epochs, batch_size=rows, learning_rate_multiplier=multiplier), sequences


def auto_epochs(rows: int) -> int:
    """The epochs that `auto` stands for."""
    if rows * TARGET_EPOCHS < LEAST_ROWS:
        return max(TARGET_EPOCHS, min(AUTO_EPOCHS, LEAST_ROWS // max(rows, 1)))
    if rows * TARGET_EPOCHS > MOST_ROWS:
        return max(1, MOST_ROWS // rows)
    return TARGET_EPOCHS


def _auto_batch(counts: Counts, epochs: int) -> int:
    """Sequences of a batch: BATCH_SEQUENCES, halved until the run has enough steps and no row twice in a batch."""
    size = BATCH_SEQUENCES
    while size > 1 and (size > counts.sequences or epochs * counts.sequences / size < ENOUGH_STEPS):
        size //= 2
    return math.ceil(size / counts.unit) * counts.unit
