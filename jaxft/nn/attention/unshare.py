"""Values of tokens at the places of whole documents, for attention, and back (`WholeDocuments`)."""

# B batch, S sequence, W rows of whole documents for each row, X = B * W, N heads, H head_dim

import jax
import jax.numpy as jnp

from jaxft.nn import partition
from jaxft.nn.whole_documents import WholeDocuments


def unshare(x: jax.Array, whole: WholeDocuments[jax.Array]) -> jax.Array:
    """Values of tokens [B, S, ...] at the tokens of whole documents: [B * W, S, ...]."""
    rows, ways, length = whole.index_BWS.shape
    index = whole.index_BWS.reshape(rows, ways * length, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1).reshape(rows * ways, length, *x.shape[2:])


def unshare_heads(x_BSNH: jax.Array, whole: WholeDocuments[jax.Array]) -> jax.Array:
    """`unshare` of queries, keys or values: [B * W, S, N, H], whose heads the mesh splits as before."""
    return partition.split(unshare(x_BSNH, whole), "batch", "sequence", "tensor", None)


def gather_back(x_XSNH: jax.Array, whole: WholeDocuments[jax.Array]) -> jax.Array:
    """The inverse of `unshare_heads`: [B * W, S, N, H] -> [B, S, N, H]. A shared token is the same in all documents."""
    rows, ways, length = whole.index_BWS.shape
    flat = x_XSNH.reshape(rows, ways * length, *x_XSNH.shape[2:])
    back_BSNH = jnp.take_along_axis(flat, whole.back_BS[:, :, None, None], axis=1)
    return partition.split(back_BSNH, "batch", "sequence", "tensor", None)
