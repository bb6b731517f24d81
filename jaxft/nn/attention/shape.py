"""The sizes and switches of attention layers."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxft.nn.attention.score_form import PLAIN, ScoreForm


class QueryGrowth(NamedTuple):
    """Queries at position p are multiplied by `1 + factor log(1 + floor((p + 1) / every))` (arXiv:2501.19399)."""

    every: int
    factor: float


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes and switches of one attention layer.

    form: window, scale and cap of the scores. qk_norm: normalises queries and keys before the rotation, each head
    separately or the whole projection. fused: q, k and v are one `qkv_proj`, in this order. sinks: a learnt score for
    each head that takes a share of the softmax (arXiv:2309.17453). rope: index of this layer's rope in the decoder's;
    None: positions are not encoded. pairs: neighbouring dimensions are rotated together, and not the halves of a head.
    normed_after_rope: the norm of queries and keys comes after the rotation. gated: `q_proj` also gives a gate for each
    head's output, beside its query, whose sigmoid multiplies it. v_norm: each head of the values is normalised too,
    without a parameter. keys_as_values: values are the keys as projected, before norm and rotation. unscaled_qk: the
    norm of queries and keys has no parameter. chunk: positions are cut into chunks of so many, and a token sees no
    other chunk than its own; None for no chunks. growth: of queries with their position. kept_as: the name under which
    keys and values are kept for later layers; None if no layer uses them.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    use_bias: bool = False
    use_output_bias: bool = False
    form: ScoreForm = PLAIN
    qk_norm: Literal["head", "whole"] | None = None
    fused: bool = False
    sinks: bool = False
    rope: int | None = 0
    pairs: bool = False
    normed_after_rope: bool = False
    gated: bool = False
    v_norm: bool = False
    keys_as_values: bool = False
    unscaled_qk: bool = False
    chunk: int | None = None
    growth: QueryGrowth | None = None
    kept_as: str | None = None

    @property
    def reach(self) -> int | None:
        """The number of latest tokens that a token may see, including itself; None for all."""
        return self.form.window or self.chunk
