"""The frame that decoder-only families share: embed, stacked layers, norm, unembed."""

# B batch, S sequence, D model, H head_dim, V vocab

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import stack, virtual
from jaxft.nn.attention import cache as kv
from jaxft.nn.attention.layer import Tokens
from jaxft.nn.attention.rope import Rope, rotation
from jaxft.nn.attention.score_form import capped
from jaxft.nn.block import Block, BlockShape
from jaxft.nn.experts.layer import MoEShape
from jaxft.nn.experts.router_sums import RouterSums
from jaxft.nn.linear import Embedding, Linear
from jaxft.nn.noise import add_noise
from jaxft.nn.norm import NormShape, RMSNorm
from jaxft.trees import flatten


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """What a family's Config says its network is.

    layers: the shape of every layer in order; runs and patterns of equal ones are stacked. embed_scale: what embedded
    tokens are multiplied by, rounded to the type of computation as transformers does. logit_softcap: logits l become
    softcap * tanh(l / softcap).
    """

    layers: tuple[BlockShape, ...]
    ropes: tuple[Rope, ...]
    norm: NormShape
    embed_scale: float | None = None
    logit_softcap: float | None = None


class Decoder(nnx.Module):
    """`Model(tokens, positions, segments, cache) -> (hidden, cache)` and `unembed(hidden) -> logits`.

    layers[g] is a stack of equal layers; `segments` says which layer numbers each stack holds. experts: how many the
    layers that have any choose from, None where no layer has. config: a family's Config, whose `shape()` gives the
    DecoderShape. marks: one for each layer; unlike ones are not stacked together. trainable_paths: those of the
    parameters that are trained, None for all. virtual_tokens: with how many of them every row has to begin;
    prompt: a slot for what embeds them, `prompt(x_BSD, virtual_BS)`. shared: a slot for what adapters of all layers
    have in common.
    """

    def __init__(
        self,
        config: Any,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
        remat: str = "none",
        marks: Sequence[Hashable] | None = None,
    ) -> None:
        shape: DecoderShape = config.shape()
        self.config = config
        self.ropes = shape.ropes
        self.embed_scale, self.logit_softcap = shape.embed_scale, shape.logit_softcap
        self.dtype = dtype
        self.remat = remat
        self.trainable_paths: frozenset[str] | None = None
        self.virtual_tokens = 0
        self.prompt, self.shared = nnx.data(None), nnx.data(None)
        marks = (None,) * len(shape.layers) if marks is None else marks
        self.segments = stack.layout(tuple(zip(shape.layers, marks, strict=True)))
        self.experts = next((block.mlp.experts for block in shape.layers if isinstance(block.mlp, MoEShape)), None)
        table = {"stddev": config.initializer_range, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **table)

        def make_layer(block: BlockShape, rngs: nnx.Rngs) -> Block:
            return Block(block, **table | {"rngs": rngs})

        self.layers = nnx.List(
            [
                stack.make_group(functools.partial(make_layer, shape.layers[group[0]]), len(group), rngs)
                for group in stack.group_layers(self.segments)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, shape.norm, dtype=dtype, param_dtype=param_dtype)
        tied = config.tie_word_embeddings
        self.lm_head = nnx.data(None) if tied else Linear(config.hidden_size, config.vocab_size, **table)

    def __call__(
        self,
        tokens_BS: jax.Array,
        positions_BS: jax.Array | None = None,
        segments_BS: jax.Array | None = None,
        cache: kv.Cache | None = None,
        key: jax.Array | None = None,
        noise_alpha: float | None = None,
    ) -> tuple[jax.Array, kv.Cache | None]:
        """Hidden vectors after the last norm, [B, S, D], and the cache with the new tokens in it.

        tokens_BS: int32, those of `virtual.virtual_ids` first where the model has virtual tokens. positions_BS: 0, 1,
        2, ... where not given. segments_BS: all one document where not given; 0 marks padding. key: turns dropout on,
        and noise of that size on embedded tokens (`add_noise`) where noise_alpha is given.
        """
        hidden_BSD, cache, _ = self._run(tokens_BS, positions_BS, segments_BS, cache, key, None, noise_alpha)
        return hidden_BSD, cache

    def routed(
        self,
        tokens_BS: jax.Array,
        positions_BS: jax.Array,
        segments_BS: jax.Array,
        key: jax.Array | None,
        noise_alpha: float | None = None,
    ) -> tuple[jax.Array, RouterSums]:
        """Hidden vectors as above, and how the routers of all layers spread the tokens, for a model with experts."""
        zero = RouterSums.zero(self.experts)
        hidden_BSD, _, routing = self._run(tokens_BS, positions_BS, segments_BS, None, key, zero, noise_alpha)
        return hidden_BSD, routing

    def _run(self, tokens_BS, positions_BS, segments_BS, cache, key, routing, noise_alpha):
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape)
        if segments_BS is None:
            segments_BS = jnp.ones_like(tokens_BS)
        rotations = tuple(rotation(rope, self.config.head_dim, positions_BS, segments_BS) for rope in self.ropes)
        virtual_BS = None
        if self.virtual_tokens:
            virtual_BS = tokens_BS - virtual.FIRST
            tokens_BS = jnp.where(virtual_BS >= 0, 0, tokens_BS)
        x_BSD = self.embed_tokens(tokens_BS)
        if noise_alpha is not None and key is not None:
            x_BSD = add_noise(x_BSD, segments_BS, noise_alpha, key)
        if self.embed_scale is not None:
            x_BSD = x_BSD * jnp.asarray(self.embed_scale, self.dtype)
        if self.prompt is not None:
            x_BSD = self.prompt(x_BSD, virtual_BS)
        x_BSD, cache, routing = stack.run(
            self.layers,
            self.segments,
            x_BSD,
            Tokens(positions_BS, segments_BS, rotations, virtual_BS=virtual_BS),
            cache=cache,
            key=key,
            remat=self.remat,
            routing=routing,
            lent=None if self.shared is None else self.shared.lent(self.dtype),
        )
        return self.norm(x_BSD), cache, routing

    def for_length(self, length: int) -> "Decoder":
        """The model, on the same parameters, for continuing rows of up to `length` tokens through a cache.

        Only longrope differs: its factors follow from the length of a row, and what is in the cache was turned by
        one of the two sets. transformers starts anew when a row outgrows the short ones; this takes the long ones
        from the start.
        """
        model = nnx.merge(*nnx.split(self))
        model.ropes = tuple(rope.for_length(length) for rope in self.ropes)
        return model

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden: [..., D] -> logits [..., V] float32."""
        unembed, params, _ = self.split_unembed()
        return unembed(params, hidden)

    def split_unembed(self) -> tuple[Callable[[Any, jax.Array], jax.Array], Any, list[tuple[Any, ...]]]:
        """`unembed` as a pure function of (its parameters, hidden), those parameters, and what the dimensions of each
        leaf of them are, for `jaxft.nn.partition`.
        """
        tied, softcap = self.lm_head is None, self.logit_softcap
        graphdef, params = nnx.split(self.embed_tokens if tied else self.lm_head)

        def unembed(params: Any, hidden: jax.Array) -> jax.Array:
            module = nnx.merge(graphdef, params)
            return capped(module.scores(hidden) if tied else module(hidden).astype(jnp.float32), softcap)

        stored = (self.embed_tokens if tied else self.lm_head).stored()
        return unembed, params, [stored[path] for path in flatten(params)[0]]

    def init_cache(self, batch: int, length: int) -> kv.Cache:
        """An empty cache for `batch` rows of up to `length` tokens; layers with a window keep only that many."""
        shapes = [group.self_attn.shape for group in self.layers]
        counts = [len(group) for group in stack.group_layers(self.segments)]
        return tuple(
            kv.empty(count, batch, min(length, shape.form.window or length), shape.kv_heads, shape.head_dim, self.dtype)
            for count, shape in zip(counts, shapes, strict=True)
        )
