"""Multi-head latent attention (arXiv:2405.04434): keys and values of all heads come from one short vector a token."""

# B batch, S queries, T keys, D model, N heads, H query and key size, P its part without positions, O its rotated part,
# V value size, C size of the latent vector, X = C + O, R stacked layers

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.nn import partition
from jaxft.nn.attention import cache as kv
from jaxft.nn.attention.causal import causal_attention
from jaxft.nn.attention.decoding import attend_with_new, writes_later
from jaxft.nn.attention.layer import Tokens, attend_cached, causal_mask
from jaxft.nn.attention.rope import rotate
from jaxft.nn.attention.saving import NAME
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.attention.unshare import gather_back, unshare, unshare_heads
from jaxft.nn.linear import KERNEL_DIMS, WHOLE, Linear
from jaxft.nn.norm import Norm, NormShape
from jaxft.quant import dense

LATENT_EPS = 1e-6  # of the latent vectors' norms, whatever the model's own is


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """Sizes and switches of one layer.

    query_rank: size of the queries' own latent vector; None: queries are projected directly. rank: of the latent vector
    of keys and values. plain_dim, rotated_dim: the parts of queries and keys without positions and with them.
    value_dim: of values. scale: factor on scores. rope: index of the rope in the decoder's. pairs: as for Attention.
    use_bias: of the projections to latent vectors, and of the output.
    """

    width: int
    heads: int
    query_rank: int | None
    rank: int
    plain_dim: int
    rotated_dim: int
    value_dim: int
    scale: float
    rope: int = 0
    pairs: bool = True
    use_bias: bool = False

    @property
    def query_dim(self) -> int:
        """The size of a head's queries and keys."""
        return self.plain_dim + self.rotated_dim


class LatentAttention(nnx.Module):
    """Over whole rows, keys and values are computed for all heads. With a cache they are not.

    The cache holds the latent vector and the rotated part of the keys, which all heads share. Each head's queries are
    multiplied by its keys' matrix instead, and the weighted sum of latent vectors by its values' matrix.
    """

    def __init__(
        self, shape: LatentShape, norm: NormShape, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        linear = functools.partial(Linear, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kept = functools.partial(linear, keep=NAME)
        make_norm = functools.partial(Norm, shape=NormShape(eps=LATENT_EPS), dtype=dtype, param_dtype=param_dtype)
        self.shape, self.dtype = shape, dtype
        queries = shape.heads * shape.query_dim
        if shape.query_rank is None:
            self.q_proj = linear(shape.width, queries)
        else:
            self.q_a_proj = kept(shape.width, shape.query_rank, use_bias=shape.use_bias)
            self.q_a_layernorm = make_norm(shape.query_rank)
            self.q_b_proj = linear(shape.query_rank, queries)
        self.kv_a_proj_with_mqa = kept(shape.width, shape.rank + shape.rotated_dim, use_bias=shape.use_bias)
        self.kv_a_layernorm = make_norm(shape.rank)
        # Keys are larger, because every head's have the part with positions that all share.
        self.kv_b_proj = kept(shape.rank, shape.heads * (shape.plain_dim + shape.value_dim))
        self.o_proj = linear(shape.heads * shape.value_dim, shape.width, use_bias=shape.use_bias, tp_side="inputs")

    def __call__(
        self,
        x_BSD: jax.Array,
        tokens: Tokens,
        cache: kv.LayerCache | None,
        layer: jax.Array,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, kv.LayerCache | kv.NewKeys | None]:
        """See Attention."""
        key = (None,) * 4 if keys is None else keys
        q_BSNH, latent_BSC, rotated_BS1O = self._project(x_BSD, key)
        written: kv.LayerCache | kv.NewKeys | None = None
        if cache is None:
            out_BSNV = self._over_rows(q_BSNH, latent_BSC, rotated_BS1O, tokens, key[2])
        else:
            out_BSNV, written = self._with_cache(q_BSNH, latent_BSC, rotated_BS1O, tokens, cache, layer)
        out_BSX = out_BSNV.reshape(*x_BSD.shape[:2], self.shape.heads * self.shape.value_dim)
        return self.o_proj(partition.split(out_BSX, "batch", "sequence", "tensor"), key[3]), written

    def init_cache(self, layers: int, batch: int, length: int) -> kv.LayerCache:
        """The empty cache of a stack of such layers: a single head of keys, and no values beside them."""
        shape = self.shape
        empty = kv.empty(layers, batch, length, 1, shape.rank + shape.rotated_dim, self.dtype)
        return empty._replace(v_RBKTH=empty.v_RBKTH[..., :0])

    def _project(
        self, x_BSD: jax.Array, key: tuple[jax.Array | None, ...] | jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, S, N, H], latent vectors [B, S, C], and the part of keys that is to be rotated [B, S, 1, O]."""
        shape = self.shape
        if shape.query_rank is None:
            q = self.q_proj(x_BSD, key[0])
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD, key[0])), key[0])
        q_BSNH = q.reshape(*x_BSD.shape[:2], shape.heads, shape.query_dim)
        latent_BSC, rotated_BSO = jnp.split(self.kv_a_proj_with_mqa(x_BSD, key[1]), (shape.rank,), axis=-1)
        q_BSNH = partition.split(q_BSNH, "batch", "sequence", "tensor", None)
        return q_BSNH, self.kv_a_layernorm(latent_BSC), rotated_BSO[:, :, None]

    def _rotated(self, q_BSNH: jax.Array, rotated_BS1O: jax.Array, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
        """Queries and the shared part of keys with their positions."""
        turn = functools.partial(rotate, rotation=tokens.rotations[self.shape.rope], pairs=self.shape.pairs)
        plain_BSNP, turned_BSNO = jnp.split(q_BSNH, (self.shape.plain_dim,), axis=-1)
        return jnp.concatenate([plain_BSNP, turn(turned_BSNO)], axis=-1), turn(rotated_BS1O)

    def _over_rows(
        self, q_BSNH: jax.Array, latent_BSC: jax.Array, rotated_BS1O: jax.Array, tokens: Tokens, key: jax.Array | None
    ) -> jax.Array:
        shape, segments_BS = self.shape, tokens.segments_BS
        both = self.kv_b_proj(latent_BSC, key).reshape(*latent_BSC.shape[:2], shape.heads, -1)
        both_BSNX = partition.split(both, "batch", "sequence", "tensor", None)
        if tokens.whole is not None:
            q_BSNH, both_BSNX = unshare_heads(q_BSNH, tokens.whole), unshare_heads(both_BSNX, tokens.whole)
            rotated_BS1O = unshare(rotated_BS1O, tokens.whole)
            segments_BS = tokens.whole.segments_BWS.reshape(q_BSNH.shape[:2])
        q_BSNH, rotated_BS1O = self._rotated(q_BSNH, rotated_BS1O, tokens)
        q_BSNH = checkpoint_name(q_BSNH, NAME)
        plain_BSNP, v_BSNV = jnp.split(both_BSNX, (shape.plain_dim,), axis=-1)
        rotated_BSNO = jnp.broadcast_to(rotated_BS1O, (*plain_BSNP.shape[:3], shape.rotated_dim))
        k_BSNH = jnp.concatenate([plain_BSNP, rotated_BSNO], axis=-1)
        out_BSNV = causal_attention(q_BSNH, k_BSNH, v_BSNV, segments_BS, ScoreForm(scale=shape.scale))
        return out_BSNV if tokens.whole is None else gather_back(out_BSNV, tokens.whole)

    def _with_cache(
        self, q_BSNH: jax.Array, latent_BSC: jax.Array, rotated_BS1O: jax.Array, tokens: Tokens, cache: kv.LayerCache,
        layer: jax.Array,
    ) -> tuple[jax.Array, kv.LayerCache | kv.NewKeys]:  # fmt: skip
        """What each head takes from these tokens and those in the cache, [B, S, N, V], and the cache or what is new."""
        q_BSNH, rotated_BS1O = self._rotated(q_BSNH, rotated_BS1O, tokens)
        latent_BS1X = jnp.concatenate([latent_BSC[:, :, None], rotated_BS1O], axis=-1)
        # Values are the latent vectors, which the keys hold already.
        new = kv.NewKeys(latent_BS1X, latent_BS1X[..., :0])
        if writes_later(q_BSNH.shape[1]):
            mask_BST = causal_mask(tokens.positions_BS, tokens.positions_before())
            out_BSNV = self._over_cache(q_BSNH, cache.k_RBKHT[layer], mask_BST, latent_BS1X)
            return out_BSNV, new
        slots_BS = kv.slots_for(tokens.positions_BS, tokens.segments_BS, cache.slots)
        cache = kv.write(cache, layer, slots_BS, *new)
        mask_BST = causal_mask(tokens.positions_BS, cache.positions_BT)
        return self._over_cache(q_BSNH, cache.k_RBKHT[layer], mask_BST), cache

    def _over_cache(
        self, q_BSNH: jax.Array, keys_B1XT: jax.Array, mask_BST: jax.Array, new_BS1X: jax.Array | None = None
    ) -> jax.Array:
        """new_BS1X: of the only query, if it is not in the cache yet."""
        shape, form = self.shape, ScoreForm(scale=self.shape.scale)
        to_keys_CNP, to_values_CNV = jnp.split(self._matrices(), (shape.plain_dim,), axis=-1)
        plain_BSNP, rotated_BSNO = jnp.split(q_BSNH, (shape.plain_dim,), axis=-1)
        latent_BSNC = jnp.einsum("BSNP,CNP->BSNC", plain_BSNP, to_keys_CNP)
        q_BSNX = jnp.concatenate([latent_BSNC, rotated_BSNO], axis=-1)
        latents_B1TC = keys_B1XT[:, :, : shape.rank].swapaxes(2, 3)
        if new_BS1X is None:
            out_BSNC = attend_cached(q_BSNX, keys_B1XT, latents_B1TC, mask_BST, form)
        else:
            new = kv.NewKeys(new_BS1X, new_BS1X[..., : shape.rank])
            out_BSNC = attend_with_new(q_BSNX, keys_B1XT, latents_B1TC, new, mask_BST, form)
        return jnp.einsum("BSNC,CNV->BSNV", out_BSNC, to_values_CNV)

    def _matrices(self) -> jax.Array:
        """The matrices of `kv_b_proj` by head, [C, N, P + V], with its adapter merged, in the type of computation."""
        layer = self.kv_b_proj
        kernel = layer.kernel.get_value()
        if layer.adapter is None:
            kernel = dense(kernel, self.dtype)
        else:
            kernel = layer.adapter.merged(dense(kernel, jnp.float32))
        whole = partition.gather(kernel.astype(self.dtype), KERNEL_DIMS["outputs"], WHOLE["outputs"])
        return whole.reshape(self.shape.rank, self.shape.heads, -1)
