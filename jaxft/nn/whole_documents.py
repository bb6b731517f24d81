"""Rows in which several documents share the tokens that they begin with, such as the answers to one prompt.

A row has the shared tokens once. All layers but attention work on each token alone, so they compute them once;
attention sees rows in which every document is whole. Source: Prefix Grouper, arXiv:2506.05433, whose two calls of
attention are one here.
"""

# B batch, S sequence, W rows of whole documents for each row

from typing import Generic, NamedTuple, TypeVar

# np.ndarray on the host, jax.Array on devices, jax.ShapeDtypeStruct in plans.
Array = TypeVar("Array")


class WholeDocuments(NamedTuple, Generic[Array]):
    """Where the tokens of a batch [B, S] are in rows of whole documents, of which W of length S belong to each row.

    index_BWS: int32, the position in the row of every token there; 0 on padding. segments_BWS: int32, as in a batch.
    back_BS: int32, from 0 to W * S - 1, where every token of the row is there, the first time if it is shared; 0 on
    padding.
    """

    index_BWS: Array
    segments_BWS: Array
    back_BS: Array
