"""Log-probabilities of whole documents: sums over the trained tokens of each document of a packed row."""

# B batch, S sequence, D model, P documents that a row can hold

from functools import partial

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch, most_documents
from jaxft.nn.decoder import Decoder
from jaxft.objectives.token_logps import token_logps, token_statistics
from jaxft.objectives.token_loss import TokenStatistics


def document_sums(values_BS: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """The values of each document's positions, added up, [B, P]; document p of a row is at p - 1, as in `Batch.values`.

    Places without a document hold 0.
    """
    segments = most_documents(segments_BS.shape[1]) + 1  # segment 0 is the padding
    return jax.vmap(partial(jax.ops.segment_sum, num_segments=segments))(values_BS, segments_BS)[:, 1:]


def existing_documents(segments_BS: jax.Array) -> jax.Array:
    """1 where a row has a document, else 0: [B, P] float32, in the places of `document_sums`."""
    numbers = jnp.arange(1, most_documents(segments_BS.shape[1]) + 1)
    return (numbers <= jnp.max(segments_BS, axis=1)[:, None]).astype(jnp.float32)


def by_position(values_BP: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """At each position the value of its document, [B, S]; 0 on padding. values_BP: in the places of `document_sums`."""
    with_padding = jnp.pad(values_BP, ((0, 0), (1, 0)))  # segment 0 is the padding
    return jnp.take_along_axis(with_padding, segments_BS, axis=1)


def target_logps(
    model: Decoder, hidden_BSD: jax.Array, batch: Batch[jax.Array], *, temperature: float = 1.0
) -> jax.Array:
    """The log-probability of every trained target in nats, [B, S] float32; 0 if a position is not trained.

    temperature: divides the logits.
    """
    unembed, head, dimensions = model.split_unembed()
    return token_logps(
        unembed, head, hidden_BSD, batch.targets_BS, batch.weights_BS, temperature=temperature, dimensions=dimensions
    )


def target_statistics(
    model: Decoder,
    hidden_BSD: jax.Array,
    batch: Batch[jax.Array],
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> TokenStatistics:
    """`target_logps`, and the entropies and sums of squares of the same distributions.

    The entropies have a gradient if `entropy_gradient`; otherwise, as the sums of squares always, they are constants.
    """
    unembed, head, dimensions = model.split_unembed()
    return token_statistics(
        unembed,
        head,
        hidden_BSD,
        batch.targets_BS,
        batch.weights_BS,
        entropy_gradient=entropy_gradient,
        temperature=temperature,
        dimensions=dimensions,
    )


def document_logps(model: Decoder, batch: Batch[jax.Array]) -> jax.Array:
    """The log-probability of each document's trained tokens in nats, without dropout, [B, P] float32."""
    hidden_BSD, _ = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS)
    return document_sums(target_logps(model, hidden_BSD, batch), batch.segments_BS)
