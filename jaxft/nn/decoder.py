"""The frame that decoder-only families share: embed, stacked layers, norm, unembed."""

# B batch, S sequence, D model, H head_dim, V vocab

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import cache as kv
from jaxft.nn import stack
from jaxft.nn.attention import Tokens
from jaxft.nn.linear import Embedding, Linear
from jaxft.nn.norm import RMSNorm
from jaxft.nn.rope import Rope, rotation


class Decoder(nnx.Module):
    """`Model(tokens, positions, segments, cache) -> (hidden, cache)` and `unembed(hidden) -> logits`.

    layers[g] is a stack of equal layers; `segments` says which layer numbers each stack holds.
    """

    def __init__(
        self,
        config: Any,
        *,
        kinds: tuple[str, ...],
        make_layer: Callable[[str, nnx.Rngs], nnx.Module],
        rope: Rope,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
        remat: str = "none",
    ) -> None:
        self.config = config
        self.rope = rope
        self.dtype = dtype
        self.remat = remat
        self.segments = stack.layout(kinds)
        table = {"stddev": config.initializer_range, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **table)
        self.layers = nnx.List(
            [
                stack.make_group(functools.partial(make_layer, kinds[group[0]]), len(group), rngs)
                for group in stack.group_layers(self.segments)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, param_dtype=param_dtype)
        tied = config.tie_word_embeddings
        self.lm_head = nnx.data(None) if tied else Linear(config.hidden_size, config.vocab_size, **table)

    def __call__(
        self,
        tokens_BS: jax.Array,
        positions_BS: jax.Array | None = None,
        segments_BS: jax.Array | None = None,
        cache: kv.Cache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, kv.Cache | None]:
        """Hidden vectors after the last norm, [B, S, D], and the cache with the new tokens in it.

        tokens_BS: int32. positions_BS: 0, 1, 2, ... where not given. segments_BS: all one document
        where not given; 0 marks padding. key: turns dropout on.
        """
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape)
        if segments_BS is None:
            segments_BS = jnp.ones_like(tokens_BS)
        tokens = Tokens(positions_BS, segments_BS, *rotation(self.rope, self.config.head_dim, positions_BS))
        x_BSD = self.embed_tokens(tokens_BS)
        x_BSD, cache = stack.run(
            self.layers, self.segments, x_BSD, tokens, cache=cache, key=key, remat=self.remat
        )
        return self.norm(x_BSD), cache

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden: [..., D] -> logits [..., V] float32."""
        if self.lm_head is None:
            return self.embed_tokens.scores(hidden)
        return self.lm_head(hidden).astype(jnp.float32)

    def split_unembed(self) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
        """`unembed` as a pure function of (its parameters, hidden), and those parameters."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        graphdef, params = nnx.split(head)
        tied = self.lm_head is None

        def unembed(params: Any, hidden: jax.Array) -> jax.Array:
            module = nnx.merge(graphdef, params)
            return module.scores(hidden) if tied else module(hidden).astype(jnp.float32)

        return unembed, params

    def init_cache(self, batch: int, length: int) -> kv.Cache:
        """An empty cache for `batch` rows of up to `length` tokens."""
        config = self.config
        return tuple(
            kv.empty(len(group), batch, length, config.num_key_value_heads, config.head_dim, self.dtype)
            for group in stack.group_layers(self.segments)
        )
