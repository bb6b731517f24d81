"""Sizes of a model: parameters that multiply each token, groups of attention layers, widths of products."""

# B batch, S sequence, N query heads, K kv heads, H head_dim, D model, L layers

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from jaxft.adapters.attach import AdapterParam
from jaxft.nn.attention.latent import LatentAttention
from jaxft.nn.attention.layer import Attention
from jaxft.nn.decoder import Decoder
from jaxft.nn.param_kind import Constant, in_adapter
from jaxft.nn.per_layer.inputs import PREFIX
from jaxft.nn.recurrent.layer import Recurrent
from jaxft.nn.residual import altup
from jaxft.nn.stack import group_layers
from jaxft.quant import is_quantized
from jaxft.trees import flatten


@dataclass(frozen=True, kw_only=True)
class AttentionGroup:
    """`layers` attention layers of one shape: N query and K key/value heads of size H.

    window: None for full causal attention. reached: number of these layers that gradients pass through.
    """

    layers: int
    reached: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True, kw_only=True)
class RecurrentGroup:
    """`layers` recurrent layers of one shape. reached: as in AttentionGroup. state: numbers of a row's state in one
    layer. token_flops: of one token forward in one layer, projections left out.
    """

    layers: int
    reached: int
    state: int
    token_flops: int


@dataclass(frozen=True, kw_only=True)
class StreamGroup:
    """`count` streams of width `width` that each of `layers` layers mixes (AltUp). reached: as in AttentionGroup."""

    count: int
    width: int
    layers: int
    reached: int

    @property
    def token_flops(self) -> int:
        """FLOPs of one token forward in one layer: every stream is predicted from all, then corrected."""
        return 2 * (self.count + 1) * self.count * self.width


@dataclass(frozen=True, kw_only=True)
class Experts:
    """`count` experts in each of `layers` layers; every token is computed by `chosen` of them.

    parameters: of all experts of all layers. outputs: sum of the output widths of the chosen experts' products over all
    layers.
    """

    layers: int
    count: int
    chosen: int
    parameters: int
    outputs: int

    @property
    def active(self) -> int:
        """Parameters that multiply one token."""
        return self.parameters * self.chosen // self.count


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of one model with its adapters.

    parameters: without adapters. active: those that multiply every token: no embedding table, only the chosen experts,
    a tied head once. adapter: parameters of adapters. trainable: adapters alone if there are any, else the trained part
    of `parameters`. trained, reached: active parameters that are trained, and that gradients pass through. outputs: sum
    of the output widths of all layers' matrix products for one token. width: D. layers: L. vocab: the width of
    logits; 0 for a reward model, which has none. experts: None for a dense model. own_inputs: numbers of a token that
    all layers together have as inputs of their own. streams: None for a residual of one stream.
    """

    parameters: int
    active: int
    adapter: int
    trainable: int
    trained: int
    reached: int
    outputs: int
    width: int
    layers: int
    vocab: int
    attention: tuple[AttentionGroup, ...]
    experts: Experts | None
    recurrent: tuple[RecurrentGroup, ...] = ()
    own_inputs: int = 0
    streams: StreamGroup | None = None

    @property
    def stream_count(self) -> int:
        """The number of streams of the residual."""
        return 1 if self.streams is None else self.streams.count

    def model_flops(self, rows: int, length: int) -> int:
        """FLOPs of one step over rows of `length` tokens, recomputation left out.

        Two FLOPs per parameter and token forward, two for the gradient of activations, and two for the gradient of
        trained weights. Attention counts only scores that causal order and window allow.
        """
        tokens = rows * length
        products = 2 * (self.active + self.reached + self.trained) * tokens + 6 * self.adapter * tokens
        states = self.recurrent_flops(tokens) + self.stream_flops(tokens)
        return products + self.attention_flops(rows, length) + states

    def recurrent_flops(self, tokens: int) -> int:
        """FLOPs of the states of recurrent layers for so many tokens, forward and backward."""
        return tokens * sum((group.layers + 2 * group.reached) * group.token_flops for group in self.recurrent)

    def stream_flops(self, tokens: int) -> int:
        """FLOPs that mix the streams of so many tokens, forward and backward."""
        streams = self.streams
        return 0 if streams is None else tokens * (streams.layers + 2 * streams.reached) * streams.token_flops

    def forward_flops(self, rows: int, length: int) -> int:
        """FLOPs of a forward pass over rows of `length` tokens, without adapters."""
        scores = sum(4 * group.layers * _score_products(length, group) for group in self.attention)
        states = length * sum(group.layers * group.token_flops for group in self.recurrent)
        if self.streams is not None:
            states += length * self.streams.layers * self.streams.token_flops
        return rows * (2 * self.active * length + scores + states)

    def attention_flops(self, rows: int, length: int, *, parts: int = 1, balanced: bool = False) -> int:
        """FLOPs of scores and of their products with values, as far as causal order and window allow.

        parts: number of parts into which the context axis splits a row. The last part has most to compute and the
        others wait for it, so each counts as much as the last. balanced: whether layers without a window divide
        queries so that all parts have the same to compute.
        """
        flops = 0
        for group in self.attention:
            ways = 1 if balanced and group.window is None else parts
            last = _score_products(length, group) - _score_products(length - length // ways, group)
            flops += (4 * group.layers + 8 * group.reached) * rows * ways * last
        return flops


def _score_products(length: int, group: AttentionGroup) -> int:
    """Multiplications for the scores of one row in one layer: pairs of query and key times N times H."""
    window = min(group.window or length, length)
    return group.heads * group.head_dim * (window * (window + 1) // 2 + (length - window) * window)


def sizes_of(model: Decoder) -> ModelSizes:
    """Sizes of a model, abstract or not, with or without adapters."""
    leaves, _ = flatten(nnx.state(model, nnx.Param), is_quantized)
    routers = [group.moe.shape.router for group in model.layers if group.moe is not None]
    chosen = routers[0].chosen if routers else 1
    config, first = model.config, _first_reached(model, adapted=any(in_adapter(path) for path in leaves))
    groups, constants = group_layers(model.segments), flatten(nnx.state(model, Constant))[0]
    parameters = active = adapter = trainable = trained = reached = outputs = 0
    for path, leaf in leaves.items():
        size = math.prod(leaf.shape)
        if in_adapter(path):
            adapter += size
            continue
        is_trained = path not in constants and (model.trainable_paths is None or path in model.trainable_paths)
        parameters += size
        trainable += is_trained * size
        if not (path.endswith("kernel") or (model.tied and path == "embed_tokens/embedding")):
            continue
        used = int(size * (chosen / leaf.shape[1] if len(leaf.shape) == 4 else 1))
        active += used
        trained += is_trained * used
        if path.startswith("layers/"):
            outputs += int(leaf.shape[0] * leaf.shape[-1] * (chosen if len(leaf.shape) == 4 else 1))
            layers = groups[int(path.split("/")[1])]
            reached += used * sum(layer >= first for layer in layers) // len(layers)
        else:
            reached += used
    attention_groups = tuple(
        _attention_group_of(group.mixer, layers, first)
        for group, layers in zip(model.layers, groups, strict=True)
        if isinstance(group.mixer, Attention | LatentAttention)
    )
    return ModelSizes(
        parameters=parameters,
        active=active,
        adapter=adapter,
        trainable=_size(nnx.state(model, AdapterParam)) if adapter else trainable,
        trained=0 if adapter else trained,
        reached=reached,
        outputs=outputs,
        width=config.hidden_size,
        layers=sum(map(len, groups)),
        vocab=config.vocab_size if config.head == "vocabulary" else 0,
        attention=attention_groups,
        experts=None if model.experts is None else _experts_of(model, leaves, model.experts, chosen),
        recurrent=tuple(
            _recurrent_group_of(group.mixer, layers, first)
            for group, layers in zip(model.layers, groups, strict=True)
            if isinstance(group.mixer, Recurrent)
        ),
        own_inputs=0 if model.per_layer is None else model.per_layer.layers * model.per_layer.size,
        streams=_streams_of(model, groups, first),
    )


def _streams_of(model: Decoder, groups: Sequence[Sequence[int]], first: int) -> StreamGroup | None:
    if model.streams is None:
        return None
    numbers = [layer for layers in groups for layer in layers]
    return StreamGroup(
        count=model.streams.count,
        width=model.config.hidden_size,
        layers=len(numbers),
        reached=sum(layer >= first for layer in numbers),
    )


def _experts_of(model: Decoder, leaves: dict[str, Any], count: int, chosen: int) -> Experts:
    shapes = [
        leaf.shape
        for path, leaf in leaves.items()
        if path.endswith("kernel") and len(leaf.shape) == 4 and not in_adapter(path)
    ]
    groups = zip(model.layers, group_layers(model.segments), strict=True)
    return Experts(
        layers=sum(len(layers) for group, layers in groups if group.moe is not None),
        count=count,
        chosen=chosen,
        parameters=sum(map(math.prod, shapes)),
        outputs=sum(layers * chosen * wide for layers, _, _, wide in shapes),
    )


def _size(state: nnx.State) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def _first_reached(model: Decoder, *, adapted: bool) -> int:
    """The first layer that gradients pass through."""
    paths = model.trainable_paths
    at_start = ("embed_tokens/", PREFIX, f"{altup.PREFIX}{altup.PROJECTIONS}/")
    if adapted or paths is None or any(path.startswith(at_start) for path in paths):
        return 0
    groups = group_layers(model.segments)
    trained_groups = {int(path.split("/")[1]) for path in paths if path.startswith("layers/")}
    return min((layer for group in trained_groups for layer in groups[group]), default=sum(map(len, groups)))


def _attention_group_of(attention: Attention | LatentAttention, layers: tuple[int, ...], first: int) -> AttentionGroup:
    reached = sum(layer >= first for layer in layers)
    if isinstance(attention, LatentAttention):
        latent = attention.shape
        # As many products for scores and for values together as two of this size.
        each = (latent.query_dim + latent.value_dim) // 2
        return AttentionGroup(
            layers=len(layers), reached=reached, heads=latent.heads, kv_heads=latent.heads, head_dim=each, window=None
        )
    shape = attention.shape
    return AttentionGroup(
        layers=len(layers),
        reached=reached,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        window=shape.reach,
    )


def _recurrent_group_of(mixer: Recurrent, layers: tuple[int, ...], first: int) -> RecurrentGroup:
    shape, reached = mixer.shape, sum(layer >= first for layer in layers)
    return RecurrentGroup(layers=len(layers), reached=reached, state=shape.state, token_flops=shape.token_flops)
