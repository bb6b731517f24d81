"""Inputs of every layer for each token: rows of a second embedding table, and a projection of the first one's."""

# B batch, S sequence, D model, L layers, P size of a layer's input

import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import partition
from jaxft.nn.linear import Embedding, Linear
from jaxft.nn.norm import Norm, NormShape

PREFIX = "per_layer/"  # of the paths of these parameters, whose names in files begin without it


class PerLayerInputs(nnx.Module):
    """`(norm(projection(x) / sqrt(D)) + table[token] * sqrt(P)) / sqrt(2)` for every layer. Files have these names."""

    def __init__(
        self,
        vocab: int,
        width: int,
        layers: int,
        size: int,
        norm: NormShape,
        *,
        rows: int | None = None,
        stddev: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """rows: of the table, None for one of each token. Tokens beyond them, of images and audio, have the first row,
        which they do not train.
        """
        self.layers, self.size, self.dtype = layers, size, dtype
        self.rows = None if rows == vocab else rows
        self.embed_tokens_per_layer = Embedding(
            rows or vocab, layers * size, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.per_layer_model_projection = Linear(
            width, layers * size, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.per_layer_projection_norm = Norm(size, norm, dtype=dtype, param_dtype=param_dtype)

    def __call__(self, tokens_BS: jax.Array, x_BSD: jax.Array, key: jax.Array | None) -> jax.Array:
        """[B, S, L, P]. x_BSD: the embedded tokens as the first layer sees them. key: turns dropout on."""
        shape = (*tokens_BS.shape, self.layers, self.size)
        key = None if key is None else jax.random.fold_in(key, zlib.crc32(b"per_layer"))
        looked_up = self._looked_up(tokens_BS) * jnp.asarray(self.size**0.5, self.dtype)
        projected = self.per_layer_model_projection(partition.whole(x_BSD), key)
        projected = _scaled(projected, x_BSD.shape[-1] ** -0.5).reshape(shape)
        projected = self.per_layer_projection_norm(partition.split(projected, "batch", "stream", None, None))
        return _scaled(projected + looked_up.reshape(shape), 2**-0.5)

    def _looked_up(self, tokens_BS: jax.Array) -> jax.Array:
        if self.rows is None:
            return self.embed_tokens_per_layer(tokens_BS)
        is_inside_BS = tokens_BS < self.rows
        rows = self.embed_tokens_per_layer(jnp.where(is_inside_BS, tokens_BS, 0))
        return jnp.where(is_inside_BS[..., None], rows, jax.lax.stop_gradient(rows))


def _scaled(x: jax.Array, factor: float) -> jax.Array:
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
