"""NEFTune: noise on embedded tokens, against the memorisation of answers (arXiv:2310.05914)."""

# B batch, S sequence, D model, K segments of a row

import zlib

import jax
import jax.numpy as jnp


def add_noise(x_BSD: jax.Array, segments_BS: jax.Array, alpha: float, key: jax.Array) -> jax.Array:
    """Embedded tokens plus uniform noise between -+alpha / sqrt(length * D) on each component (section 2).

    length is that of the token's own document, so that neither padding nor other documents packed into the row make the
    noise smaller. segments_BS: the number of each token's document in its row, at most S.
    """
    batch, length, width = x_BSD.shape
    rows_BS = jnp.broadcast_to(jnp.arange(batch)[:, None], segments_BS.shape)
    tokens_BK = jnp.zeros((batch, length + 1), jnp.float32).at[rows_BS, segments_BS].add(1.0)
    tokens_BS = jnp.take_along_axis(tokens_BK, segments_BS, axis=1)
    # A hash, which differs from the layer numbers that layers fold into the same key.
    drawn_BSD = jax.random.uniform(jax.random.fold_in(key, zlib.crc32(b"embed_tokens")), x_BSD.shape, minval=-1.0)
    return x_BSD + (drawn_BSD * (alpha / jnp.sqrt(tokens_BS * width))[..., None]).astype(x_BSD.dtype)
