"""Pairs of a chosen and a rejected answer, which are neighbouring documents of a packed row."""

# B batch, S sequence, D documents that a row can hold, P pairs that a row can hold

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pairs(NamedTuple):
    """A number of either answer of each pair, [B, P] float32: a log-probability, a length, a score."""

    chosen: jax.Array
    rejected: jax.Array


def by_pair(values_BD: jax.Array) -> Pairs:
    """Numbers of documents, as in `Batch.values`, as those of pairs: documents 1 and 2 are a pair, 3 and 4, ..."""
    end = values_BD.shape[1] // 2 * 2
    return Pairs(values_BD[:, 0:end:2], values_BD[:, 1:end:2])


def existing_pairs(segments_BS: jax.Array) -> jax.Array:
    """1 where a row has a pair, else 0: [B, P] float32, P as in `by_pair` of numbers of documents."""
    # A document has at least two tokens, so a pair has four. A pair exists if its second document does.
    pairs = segments_BS.shape[1] // 4
    last_B = jnp.max(segments_BS, axis=1)
    return (2 * jnp.arange(1, pairs + 1) <= last_B[:, None]).astype(jnp.float32)
