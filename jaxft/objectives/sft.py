"""Supervised fine-tuning: next-token cross-entropy on the trained tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.objectives.cross_entropy import token_sums


class LossSums(NamedTuple):
    """Sums, never means: divided once, after accumulation and across devices.

    total: float32, what is minimised. weight: float32, what to divide by. metrics: further sums.
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


Loss = Callable[[Any, Any, jax.Array | None], LossSums]


def sft_loss(model: Any, batch: Any, key: jax.Array | None) -> LossSums:
    """-log p of every trained target, in nats, summed; the weight is how many there are.

    model: a Decoder. batch: a `Batch`, [B, S]. key: turns dropout on.
    """
    hidden_BSD, _ = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS, key=key)
    unembed, head = model.split_unembed()
    sums = token_sums(unembed, head, hidden_BSD, batch.targets_BS, batch.weights_BS)
    tokens = jnp.sum(batch.segments_BS > 0).astype(jnp.float32)
    return LossSums(sums.nll, jnp.sum(batch.weights_BS), {"correct": sums.correct, "tokens": tokens})
