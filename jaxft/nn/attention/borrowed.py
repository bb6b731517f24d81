"""Attention of layers without keys and values of their own: they use those of an earlier layer."""

# B batch, S queries, T keys, D model, N query heads, K kv heads, H head_dim

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.errors import ModelError
from jaxft.nn import partition
from jaxft.nn.attention.cache import LayerCache, NewKeys
from jaxft.nn.attention.causal import causal_attention
from jaxft.nn.attention.layer import Attention, Kept, Tokens, attend_cached, causal_mask, keys_with_cached
from jaxft.nn.attention.rope import rotate
from jaxft.nn.attention.saving import NAME, keep
from jaxft.nn.attention.shape import AttentionShape
from jaxft.nn.attention.unshare import gather_back, unshare_heads
from jaxft.nn.linear import Linear
from jaxft.nn.norm import Norm, NormShape


@dataclass(frozen=True, kw_only=True)
class BorrowedShape(AttentionShape):
    """Sizes and switches of such a layer. source: the name under which the earlier layer keeps its keys and values.

    Of the switches, these have a meaning here: form, rope, pairs, use_bias, use_output_bias and qk_norm of each head.
    """

    source: str

    @classmethod
    def of(cls, shape: AttentionShape, *, source: str) -> "BorrowedShape":
        """Such a layer with the queries of another one."""
        fields = {field.name: getattr(shape, field.name) for field in dataclasses.fields(AttentionShape)}
        return cls(**fields | {"kept_as": None}, source=source)


class BorrowedAttention(Attention):
    """q projection, norm and rotation, softmax(q k / sqrt(H)) v with the keys and values of `Tokens.kept`."""

    shape: BorrowedShape

    def __init__(
        self,
        shape: BorrowedShape,
        norm: NormShape,
        *,
        stddev: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        nnx.Module.__init__(self)
        linear = functools.partial(Linear, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.shape, self.dtype = shape, dtype
        q_width = shape.heads * shape.head_dim
        self.q_proj = linear(shape.width, q_width, use_bias=shape.use_bias, keep=keep(shape.qk_norm is not None))
        self.o_proj = linear(q_width, shape.width, use_bias=shape.use_output_bias, tp_side="inputs")
        if shape.qk_norm is not None:
            self.q_norm = Norm(shape.head_dim, norm, dtype=dtype, param_dtype=param_dtype)
        self.prefix = nnx.data(None)
        self.sinks = None

    def with_keys(
        self,
        x_BSD: jax.Array,
        tokens: Tokens,
        cache: LayerCache | None,
        layer: jax.Array,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | NewKeys | None, Kept]:
        """See Attention. There is no cache but that of the earlier layer, which `tokens` has."""
        if tokens.kept is None:
            raise ModelError("a layer without keys of its own comes before all that keep them: change their order")
        key = (None,) * 4 if keys is None else keys
        q_BSNH = self._queries(x_BSD, tokens, key[0])
        out_BSNH = self._attended(q_BSNH, tokens, tokens.kept)
        if tokens.whole is not None:
            out_BSNH = gather_back(out_BSNH, tokens.whole)
        out_BSX = partition.split(out_BSNH.reshape(*x_BSD.shape[:2], -1), "batch", "sequence", "tensor")
        return self.o_proj(out_BSX, key[3]), cache, tokens.kept

    def init_cache(self, layers: int, batch: int, length: int) -> None:
        """None: the earlier layer has it."""

    def _queries(self, x_BSD: jax.Array, tokens: Tokens, key: jax.Array | None) -> jax.Array:
        shape = self.shape
        q_BSNH = self.q_proj(x_BSD, key).reshape(*x_BSD.shape[:2], -1, shape.head_dim)
        q_BSNH = partition.split(q_BSNH, "batch", "sequence", "tensor", None)
        if shape.qk_norm is not None:
            q_BSNH = self.q_norm(q_BSNH)
        if tokens.whole is not None:
            q_BSNH = unshare_heads(q_BSNH, tokens.whole)
        if shape.rope is not None:
            q_BSNH = rotate(q_BSNH, tokens.rotations[shape.rope], pairs=shape.pairs)
        return q_BSNH if shape.qk_norm is not None else checkpoint_name(q_BSNH, NAME)

    def _attended(self, q_BSNH: jax.Array, tokens: Tokens, kept: Kept) -> jax.Array:
        """What the queries take from the keys and values, [B, S, N, H]."""
        form, cache = self.shape.form, kept.cache
        if cache is None or kept.before is None:
            segments_BS = tokens.segments_BS
            if tokens.whole is not None:
                segments_BS = tokens.whole.segments_BWS.reshape(q_BSNH.shape[:2])
            return causal_attention(q_BSNH, kept.k_BSKH, kept.v_BSKH, segments_BS, form)
        if form.window is not None and q_BSNH.shape[1] > 1 and cache.slots >= form.window:
            # The cache with these tokens has lost keys that the first of them see.
            k_BKHT, v_BKTH, keys_BT = keys_with_cached(kept.before, kept.layer, kept.k_BSKH, kept.v_BSKH, tokens)
        else:
            k_BKHT, v_BKTH, keys_BT = cache.k_RBKHT[kept.layer], cache.v_RBKTH[kept.layer], cache.positions_BT
        mask_BST = causal_mask(tokens.positions_BS, keys_BT, window=form.window)
        return attend_cached(q_BSNH, k_BKHT, v_BKTH, mask_BST, form)
