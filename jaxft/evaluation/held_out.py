"""Held-out loss and perplexity."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxft.errors import DataError


def held_out_loss(eval_step: Callable[[Any], Any], batches: Iterable[Any]) -> dict[str, float]:
    """Loss over all batches, as sums divided once.

    eval_step(batch) -> LossSums. Gives eval_loss (nats per trained token), eval_perplexity (its
    exponential), eval_mean_token_accuracy (share of targets that had the highest probability) and eval_tokens.
    Raises DataError where no target is trained.
    """
    total = weight = correct = 0.0
    for batch in batches:
        sums = jax.device_get(eval_step(batch))
        total += float(sums.total)
        weight += float(sums.weight)
        correct += float(sums.metrics["correct"])
    if weight == 0:
        raise DataError("the held-out rows have no trained token, so they have no loss")
    loss = total / weight
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, 700.0)),  # math.exp overflows above 709
        "eval_mean_token_accuracy": correct / weight,
        "eval_tokens": weight,
    }
