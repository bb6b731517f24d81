"""Held-out metrics: sums over all batches, divided once."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxft.errors import DataError
from jaxft.objectives.loss import LossSums, added


def added_up(sums_of: Callable[[Any], Any], batches: Iterable[Any]) -> Any:
    """A pytree of sums, added up over all batches in float64 on the host; None if there are no batches."""
    total = None
    for batch in batches:
        sums = jax.tree.map(np.float64, jax.device_get(sums_of(batch)))
        total = sums if total is None else added(total, sums)
    return total


def held_out_metrics(eval_step: Callable[[Any], LossSums], batches: Iterable[Any]) -> dict[str, float]:
    """`eval_loss`, every metric of the loss as `eval_NAME`, and `eval_tokens` (trained tokens), over all batches.

    eval_step(batch) -> LossSums. The sums are added in float64 on the host and divided once, so that the batch size
    does not matter. Raises DataError if the rows hold nothing that the loss is taken on.
    """
    total: LossSums | None = added_up(eval_step, batches)
    if total is None or total.weight == 0:
        raise DataError("the held-out rows have no trained token, so they have no loss")
    means = {f"eval_{name}": float(value) for name, value in total.means().items()}
    return means | {"eval_tokens": float(total.trained_tokens)}
