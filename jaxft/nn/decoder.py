"""The decoder-only transformer that all families share: embedding, stacked layers, final norm, LM head."""

# B batch, S sequence, D model, H head_dim, V vocab

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxft.errors import ModelError
from jaxft.nn import stack, virtual
from jaxft.nn.attention import cache as kv
from jaxft.nn.attention.layer import Tokens
from jaxft.nn.attention.rope import Rope, rotation
from jaxft.nn.attention.score_form import cap_scores
from jaxft.nn.attention.unshare import unshare
from jaxft.nn.block import Block, BlockShape
from jaxft.nn.experts.router_sums import RouterSums
from jaxft.nn.linear import KERNEL_DIMS, Embedding, Linear
from jaxft.nn.noise import add_noise
from jaxft.nn.norm import Norm, NormShape
from jaxft.nn.partition import Dimensions
from jaxft.nn.per_layer.inputs import PerLayerInputs
from jaxft.nn.residual.altup import Streams
from jaxft.nn.score import Head, ScoreHead
from jaxft.nn.storage import StorageDims, storage_dims_of
from jaxft.nn.whole_documents import WholeDocuments
from jaxft.trees import flatten


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The network that a family's Config describes.

    layers: the shape of every layer in order; equal layers, in runs or in a repeating pattern, are stacked.
    rope_dims: the head size that each of the ropes is for; None for the config's head_dim.
    embed_scale: factor on embedded tokens, rounded to the compute dtype as in transformers. logit_softcap: logits l
    become softcap * tanh(l / softcap). logit_scale: factor on logits, before the cap. per_layer_input: the width of an
    input that each layer has for each token (`nn.per_layer`); None for none. per_layer_rows: of the table of these
    inputs; None for as many as there are tokens. streams: the number of streams of the residual (`nn.residual.altup`).
    """

    layers: tuple[BlockShape, ...]
    ropes: tuple[Rope, ...]
    norm: NormShape
    embed_scale: float | None = None
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    rope_dims: tuple[int, ...] | None = None
    per_layer_input: int | None = None
    per_layer_rows: int | None = None
    streams: int = 1


class ModelConfig(Protocol):
    """The attributes of every family's Config, under Hugging Face's names. `jaxft.models` has the implementations."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def initializer_range(self) -> float: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def head(self) -> Head: ...

    def shape(self) -> DecoderShape:
        """The network."""

    def to_hf(self) -> dict[str, Any]:
        """The same as Hugging Face's `config.json`."""


class Prompt(Protocol):
    """A module that embeds virtual tokens, for the slot `Decoder.prompt`. peft_type: its name in PEFT."""

    peft_type: str

    def __call__(self, x_BSD: jax.Array, virtual_BS: jax.Array | None) -> jax.Array:
        """x_BSD with learnt vectors at virtual tokens. virtual_BS: the number of the virtual token at each position,
        negative at other tokens; None if the model has no virtual tokens.
        """


class TokenRows(Protocol):
    """A module with rows that take the place of those of the tables, for the slot `Decoder.token_rows`."""

    def embedded(self, tokens_BS: jax.Array, x_BSD: jax.Array) -> jax.Array:
        """The embedded tokens, given x_BSD, the table's rows of tokens_BS."""

    def head(self, head: Embedding | Linear) -> Embedding | Linear:
        """The LM head with its rows. head: a Linear, or the embedding table that it is tied to."""

    def merges(self) -> Mapping[str, Callable[..., jax.Array]]:
        """For the path of each table, the table with its rows, float32, given the table and its stack index ()."""


class SharedArrays(Protocol):
    """A module with the arrays that the adapters of all layers share, for the slot `Decoder.shared`."""

    def arrays(self, dtype: DTypeLike) -> Any:
        """The value of `Adapter.shared` during a call: a pytree of arrays in `dtype`, the type of computation."""


class ValueHead(Protocol):
    """A module that estimates the return from each position, for the slot `Decoder.value`.

    Over a mesh its parameters are whole on every device, unless it declares them (`jaxft.nn.storage`).
    """

    def __call__(self, hidden_BSD: jax.Array) -> jax.Array:
        """values_BS, computed from the hidden vectors after the last norm."""


class SplitUnembed(NamedTuple):
    """`Decoder.unembed` split into a pure function and its parameters.

    logits(params, hidden [..., D]) -> [..., V] float32. storage_dims: for every leaf of params in tree order, the names
    of its dimensions in storage (`jaxft.nn.partition`).
    """

    logits: Callable[[nnx.State, jax.Array], jax.Array]
    params: nnx.State
    storage_dims: list[Dimensions]


class Decoder(nnx.Module):
    """`Model(tokens, positions, segments, cache) -> (hidden, cache)` and `unembed(hidden) -> logits`.

    layers[g] is a stack of equal layers; `segments` lists the layer numbers of each stack. experts: the number of
    experts in each layer that has experts; None if there is no such layer. trainable_paths: paths of the trained
    parameters; None: all. virtual_tokens: the number of virtual tokens at the start of every row.

    Four slots are empty (None) until something is attached. prompt: a `Prompt`, which embeds the virtual tokens.
    token_rows: `TokenRows`, which take the place of rows of the embedding table and of the LM head.
    shared: `SharedArrays` of the adapters of all layers. value: a `ValueHead`, which the decoder itself never calls:
    losses that need values call `model.value(hidden_BSD)`. Beside adapters only AdapterParams are trained, so the
    parameters of a value head that is trained with them must have that type.

    If config.head is `score`, the model is a reward model: it has a `ScoreHead` in the slot `value` and no LM head.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
        remat: str = "none",
        marks: Sequence[Hashable] | None = None,
    ) -> None:
        """remat: a key of `stack.REMAT`, or `none`. marks: one for each layer; only layers with equal marks are stacked
        together.
        """
        shape = config.shape()
        self.config = config
        self.ropes = shape.ropes
        self.rope_dims = shape.rope_dims or (config.head_dim,) * len(shape.ropes)
        self.embed_scale = shape.embed_scale
        self.logit_softcap, self.logit_scale = shape.logit_softcap, shape.logit_scale
        self.dtype = dtype
        self.remat = remat
        self.trainable_paths: frozenset[str] | None = None
        self.virtual_tokens = 0
        self.prompt: Prompt | None = nnx.data(None)
        self.token_rows: TokenRows | None = nnx.data(None)
        self.shared: SharedArrays | None = nnx.data(None)
        scored = config.head == "score"
        self.value: ValueHead | None = ScoreHead(config.hidden_size) if scored else nnx.data(None)
        marks = (None,) * len(shape.layers) if marks is None else marks
        self.segments = stack.layout(tuple(zip(shape.layers, marks, strict=True)))
        self.experts = next((block.moe.experts for block in shape.layers if block.moe is not None), None)
        stddev = config.initializer_range
        draw = functools.partial(Linear, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

        def make_layer(block: BlockShape, rngs: nnx.Rngs) -> Block:
            return Block(block, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.layers = nnx.List(
            [
                stack.make_group(functools.partial(make_layer, shape.layers[group[0]]), len(group), rngs)
                for group in stack.group_layers(self.segments)
            ]
        )
        self.norm = Norm(config.hidden_size, shape.norm, dtype=dtype, param_dtype=param_dtype)
        self.per_layer: PerLayerInputs | None = nnx.data(None)
        own_head = not (scored or config.tie_word_embeddings)
        self.lm_head: Linear | None = draw(config.hidden_size, config.vocab_size) if own_head else nnx.data(None)
        if shape.per_layer_input is not None:
            self.per_layer = PerLayerInputs(
                config.vocab_size, config.hidden_size, len(shape.layers), shape.per_layer_input, shape.norm,
                rows=shape.per_layer_rows, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip
        self.streams: Streams | None = nnx.data(None)
        if shape.streams > 1:
            self.streams = Streams(
                config.hidden_size, shape.streams, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

    def __call__(
        self,
        tokens_BS: jax.Array,
        positions_BS: jax.Array | None = None,
        segments_BS: jax.Array | None = None,
        cache: kv.Cache | None = None,
        key: jax.Array | None = None,
        noise_alpha: float | None = None,
        whole: WholeDocuments[jax.Array] | None = None,
    ) -> tuple[jax.Array, kv.Cache | None]:
        """(hidden vectors after the last norm, [B, S, D]; the cache including the new tokens).

        tokens_BS: int32; rows of a model with virtual tokens begin with `virtual.virtual_ids`. positions_BS: by default
        0, 1, 2, ... segments_BS: by default one document a row; 0 marks padding. key: turns on dropout and, if
        noise_alpha is given, noise of that size on embedded tokens (`add_noise`). whole: if documents of a row share
        the tokens that they begin with.
        """
        hidden_BSD, cache, _ = self._run(tokens_BS, positions_BS, segments_BS, cache, key, None, noise_alpha, whole)
        return hidden_BSD, cache

    def with_router_sums(
        self,
        tokens_BS: jax.Array,
        positions_BS: jax.Array,
        segments_BS: jax.Array,
        key: jax.Array | None,
        noise_alpha: float | None = None,
    ) -> tuple[jax.Array, RouterSums]:
        """(hidden vectors as above; statistics of the routers, summed over tokens and layers).

        Raises ModelError if no layer has experts.
        """
        zero = None if self.experts is None else RouterSums.zero(self.experts)
        hidden_BSD, _, routing = self._run(tokens_BS, positions_BS, segments_BS, None, key, zero, noise_alpha)
        if routing is None:
            raise ModelError("this model has no experts, so there are no routers whose choices could be summed")
        return hidden_BSD, routing

    def _run(
        self,
        tokens_BS: jax.Array,
        positions_BS: jax.Array | None,
        segments_BS: jax.Array | None,
        cache: kv.Cache | None,
        key: jax.Array | None,
        routing: RouterSums | None,
        noise_alpha: float | None,
        whole: WholeDocuments[jax.Array] | None = None,
    ) -> tuple[jax.Array, kv.Cache | None, RouterSums | None]:
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape)
        if segments_BS is None:
            segments_BS = jnp.ones_like(tokens_BS)
        where = (positions_BS, segments_BS)
        if whole is not None:
            where = (unshare(positions_BS, whole), whole.segments_BWS.reshape(-1, segments_BS.shape[1]))
        rotations = tuple(rotation(rope, size, *where) for rope, size in zip(self.ropes, self.rope_dims, strict=True))
        virtual_BS = None
        if self.virtual_tokens:
            virtual_BS = tokens_BS - virtual.FIRST
            tokens_BS = jnp.where(virtual_BS >= 0, 0, tokens_BS)
        x_BSD = self.embed_tokens(tokens_BS)
        if self.token_rows is not None:
            x_BSD = self.token_rows.embedded(tokens_BS, x_BSD)
        if noise_alpha is not None and key is not None:
            x_BSD = add_noise(x_BSD, segments_BS, noise_alpha, key)
        if self.embed_scale is not None:
            x_BSD = x_BSD * jnp.asarray(self.embed_scale, self.dtype)
        if self.prompt is not None:
            x_BSD = self.prompt(x_BSD, virtual_BS)
        virtual_of_keys_BS = virtual_BS if whole is None or virtual_BS is None else unshare(virtual_BS, whole)
        own_BSLP = None if self.per_layer is None else self.per_layer(tokens_BS, x_BSD, key)
        x_BSD, cache, routing = stack.run(
            self.layers,
            self.segments,
            x_BSD if self.streams is None else self.streams.expand(x_BSD, key),
            Tokens(positions_BS, segments_BS, rotations, virtual_BS=virtual_of_keys_BS, whole=whole),
            cache=cache,
            key=key,
            remat=self.remat,
            routing=routing,
            shared=None if self.shared is None else self.shared.arrays(self.dtype),
            own_BSLP=own_BSLP,
        )
        if self.streams is not None:
            x_BSD = self.streams.combine(x_BSD, key)
        return self.norm(x_BSD), cache, routing

    def for_length(self, length: int) -> "Decoder":
        """The model, with the same parameters, for generation of rows of up to `length` tokens with a cache.

        Only longrope differs: its factors depend on the length of a row, and keys in the cache were rotated by one of
        the two sets. transformers starts again when a row becomes too long for the short factors; this model uses the
        long ones from the start.
        """
        model = nnx.merge(*nnx.split(self))
        model.ropes = tuple(rope.for_length(length) for rope in self.ropes)
        return model

    @property
    def tied(self) -> bool:
        """Whether the embedding table is also the LM head."""
        return self.lm_head is None and self.config.head == "vocabulary"

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden: [..., D] -> logits [..., V] float32."""
        logits, params, _ = self.split_unembed()
        return logits(params, hidden)

    def split_unembed(self) -> SplitUnembed:
        """`unembed` as a pure function, its parameters, and the names of their dimensions.

        Raises ModelError for a reward model, which has no LM head.
        """
        if self.config.head == "score":
            raise ModelError(
                "this is a reward model: it has a score head in place of the LM head, so it gives no logits and "
                "generates nothing. `jaxft score` scores answers with it."
            )
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        scale, softcap = self.logit_scale, self.logit_softcap
        if self.token_rows is not None:
            head = self.token_rows.head(head)
        graphdef, params = nnx.split(head)

        def logits(params: nnx.State, hidden: jax.Array) -> jax.Array:
            module = nnx.merge(graphdef, params)
            scores = module.scores(hidden) if isinstance(module, Embedding) else module(hidden).astype(jnp.float32)
            return cap_scores(scores if scale == 1.0 else scores * scale, softcap)

        storage = storage_dims_of(head)
        return SplitUnembed(logits, params, [storage[path].dims for path in flatten(params)[0]])

    def storage_dims(self) -> dict[str, StorageDims]:
        # Split along the vocabulary, as the loss uses it; like any kernel if the axes do not divide the vocabulary.
        return {} if self.lm_head is None else {"lm_head/kernel": StorageDims((None, "both"), KERNEL_DIMS["outputs"])}

    def init_cache(self, batch: int, length: int) -> kv.Cache:
        """An empty cache for `batch` rows of up to `length` tokens; a layer with a window keeps only so many."""
        return tuple(
            None if group.mixer is None else group.mixer.init_cache(len(layers), batch, length)
            for group, layers in zip(self.layers, stack.group_layers(self.segments), strict=True)
        )
