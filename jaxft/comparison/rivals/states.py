"""What a model computes of texts that it does not answer: mean hidden states, and log-probabilities of tokens."""

# B rows, S tokens, D width of the model, V vocabulary

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.data import Tokenizer
from jaxft.errors import DataError
from jaxft.generation.buckets import bucket
from jaxft.nn.decoder import Decoder
from jaxft.nn.virtual import virtual_ids
from jaxft.runs.rewards import mesh_of

ROWS = 8  # texts that are computed at a time
LONGEST = 512  # tokens of a text that are read


def mean_states(module: Decoder, tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The mean over the tokens of a text of the last hidden states, [D] float32 each; zeros for an empty text."""

    def means(model: Decoder, hidden_BSD: jax.Array, real_BS: jax.Array) -> jax.Array:
        weights_BS1 = real_BS[..., None].astype(jnp.float32)
        total_BD = jnp.sum(hidden_BSD.astype(jnp.float32) * weights_BS1, axis=1)
        return total_BD / jnp.maximum(jnp.sum(weights_BS1, axis=1), 1)

    rows = [tokenizer.encode(text)[:LONGEST] for text in texts]
    return [vector_D for vector_D, _ in _computed(module, rows, means)]


def log_probabilities(module: Decoder, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """The log-probabilities of every next token, [S - 1, V] float32 in nats, of each row of S token ids, one by one.

    Raises DataError for a row of less than two tokens, or with ids that the model does not have.
    """
    if any(len(row) < 2 or max(row) >= module.config.vocab_size for row in rows):
        raise DataError("a text has no next token, or token ids that the model does not have")

    def logps(model: Decoder, hidden_BSD: jax.Array, real_BS: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(model.unembed(hidden_BSD).astype(jnp.float32), axis=-1)

    return (logps_SV[: length - 1] for logps_SV, length in _computed(module, rows, logps, at_once=1))


def _computed(
    module: Decoder,
    rows: Sequence[Sequence[int]],
    of: Callable[[Decoder, jax.Array, jax.Array], jax.Array],
    at_once: int = ROWS,
) -> Iterator[tuple[np.ndarray, int]]:
    """(what `of` makes of the hidden states of a row, the tokens of the row), in order; virtual tokens are left out."""
    graphdef, state = nnx.split(module)
    mesh, first = mesh_of(module), virtual_ids(module.virtual_tokens)
    count = -(-at_once // mesh.batch_shards) * mesh.batch_shards

    def compute(state: nnx.State, tokens_BS: jax.Array, segments_BS: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        hidden_BSD, _ = model(tokens_BS, None, segments_BS)
        return of(model, hidden_BSD[:, len(first) :], segments_BS[:, len(first) :] > 0)

    jitted = jax.jit(mesh.bind(compute))
    for start in range(0, len(rows), count):
        part = rows[start : start + count]
        length = len(first) + bucket(max(1, *map(len, part)))
        tokens_BS, segments_BS = (np.zeros((count, length), np.int32) for _ in range(2))
        for index, row in enumerate(part):
            tokens_BS[index, : len(first) + len(row)] = [*first, *row]
            segments_BS[index, : len(first) + len(row)] = 1
        arrays = (jax.device_put(array, mesh.batch_sharding()) for array in (tokens_BS, segments_BS))
        values = jax.device_get(jitted(state, *arrays))
        yield from ((values[index], len(row)) for index, row in enumerate(part))
