"""Which queries, keys and values rematerialisation policies save for the backward pass: each of them once."""

# B batch, S sequence, N query heads, K kv heads, H head_dim

from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxft.nn.attention.shape import AttentionShape

NAME = "dots"  # the name under which policies save them


class Early(NamedTuple):
    """Whether queries, keys and values are saved as their product gives them, and not as attention reads them.

    The gradients of norms and of gates read the former; a rotation's gradient reads neither.
    """

    queries: bool
    keys: bool
    values: bool

    @classmethod
    def of(cls, shape: AttentionShape) -> "Early":
        """Those of a layer. Parts of one product are all saved with it if one of them is."""
        queries, keys, values = shape.qk_norm is not None or shape.gated, shape.qk_norm is not None, shape.v_norm
        if shape.fused:
            return cls(*(queries or values,) * 3)
        if shape.keys_as_values:
            return cls(queries, *(keys or values,) * 2)
        return cls(queries, keys, values)

    def name_late(
        self, q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What attention reads, with the name where it was not given before."""
        q_BSNH, k_BSKH, v_BSKH = (
            x if early else checkpoint_name(x, NAME) for x, early in zip((q_BSNH, k_BSKH, v_BSKH), self, strict=True)
        )
        return q_BSNH, k_BSKH, v_BSKH


def keep(early: bool) -> str | None:
    """The argument `keep` of a projection."""
    return NAME if early else None
