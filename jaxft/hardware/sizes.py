"""A model in numbers: which parameters multiply each token, how far its attention looks, what its layers keep."""

# B batch, S sequence, N query heads, K kv heads, H head_dim, D model, L layers

import math
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from jaxft.adapters.attach import AdapterParam
from jaxft.nn.attention.layer import Attention
from jaxft.nn.stack import group_layers
from jaxft.quant import is_quantized
from jaxft.trees import flatten


@dataclass(frozen=True, kw_only=True)
class AttentionGroup:
    """`layers` attention layers of N heads of H, and K of keys; window None: back to the beginning.

    reached: how many of them gradients run through.
    """

    layers: int
    reached: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True, kw_only=True)
class Experts:
    """`count` experts in each layer that has any, of which every token meets `chosen`.

    parameters: of all experts of all layers. outputs: widths of the products of the chosen ones, all layers together.
    """

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

    parameters: all but adapters. active: those that multiply every token: no embedding table, of experts only the
    chosen ones, a tied head once. adapter: of adapters. moving: what training moves, which is adapters where there
    are any. trained, reached: those of the active ones that move, and that gradients run through. outputs: widths of
    all matrix products of all layers together, for one token. width: D. layers: L. experts: None without any.
    """

    parameters: int
    active: int
    adapter: int
    moving: int
    trained: int
    reached: int
    outputs: int
    width: int
    layers: int
    vocab: int
    attention: tuple[AttentionGroup, ...]
    experts: Experts | None

    def model_flops(self, rows: int, length: int) -> int:
        """Of one step over rows of `length` tokens, recomputation left out.

        Two FLOPs a parameter and token forward, two for the gradient of activations, and two for the gradient of
        weights that are trained. Attention counts the scores that causal order and window leave.
        """
        tokens = rows * length
        products = 2 * (self.active + self.reached + self.trained) * tokens + 6 * self.adapter * tokens
        return products + self.attention_flops(rows, length)

    def attention_flops(self, rows: int, length: int, *, parts: int = 1) -> int:
        """Of scores and of what they weigh, as far as causal order and window leave them.

        parts: into how many the context axis cuts a row. The last one sees most, and the others wait for it: the
        figure is as if all did as much.
        """
        return sum(
            (4 * look.layers + 8 * look.reached)
            * rows
            * parts
            * (_seen(length, look) - _seen(length - length // parts, look))
            for look in self.attention
        )


def _seen(length: int, look: AttentionGroup) -> int:
    """Numbers of queries times keys times width that one row's scores take."""
    window = min(look.window or length, length)
    return look.heads * look.head_dim * (window * (window + 1) // 2 + (length - window) * window)


def sizes_of(model: Any) -> ModelSizes:
    """Of a model, abstract or not, with or without adapters."""
    leaves, _ = flatten(nnx.state(model, nnx.Param), is_quantized)
    chosen = getattr(model.config, "num_experts_per_tok", 1)
    config, first = model.config, _first_reached(model, adapted=any(_is_adapter(path) for path in leaves))
    groups = group_layers(model.segments)
    parameters = active = adapter = moving = trained = reached = outputs = 0
    tied = "lm_head/kernel" not in leaves
    for path, leaf in leaves.items():
        size = math.prod(leaf.shape)
        if _is_adapter(path):
            adapter += size
            continue
        moves = model.trainable_paths is None or path in model.trainable_paths
        parameters += size
        moving += moves * size
        counts = path.endswith("kernel") or (tied and path == "embed_tokens/embedding")
        if not counts:
            continue
        used = int(size * (chosen / leaf.shape[1] if len(leaf.shape) == 4 else 1))
        active += used
        trained += moves * used
        if path.startswith("layers/"):
            outputs += int(leaf.shape[0] * leaf.shape[-1] * (chosen if len(leaf.shape) == 4 else 1))
            layers = groups[int(path.split("/")[1])]
            reached += used * sum(layer >= first for layer in layers) // len(layers)
        else:
            reached += used
    attention_groups = tuple(
        _attention_groups_of(group.self_attn, layers, first) for group, layers in zip(model.layers, groups, strict=True)
    )
    return ModelSizes(
        parameters=parameters,
        active=active,
        adapter=adapter,
        moving=_size(nnx.state(model, AdapterParam)) if adapter else moving,
        trained=0 if adapter else trained,
        reached=reached,
        outputs=outputs,
        width=config.hidden_size,
        layers=sum(look.layers for look in attention_groups),
        vocab=config.vocab_size,
        attention=attention_groups,
        experts=None if model.experts is None else _experts_of(leaves, model.experts, chosen),
    )


def _experts_of(leaves: dict[str, Any], count: int, chosen: int) -> Experts:
    shapes = [
        leaf.shape
        for path, leaf in leaves.items()
        if path.endswith("kernel") and len(leaf.shape) == 4 and not _is_adapter(path)
    ]
    return Experts(
        count=count,
        chosen=chosen,
        parameters=sum(map(math.prod, shapes)),
        outputs=sum(layers * chosen * wide for layers, _, _, wide in shapes),
    )


def _size(state: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def _is_adapter(path: str) -> bool:
    return not {"adapter", "prompt", "prefix", "shared"}.isdisjoint(path.split("/"))


def _first_reached(model: Any, *, adapted: bool) -> int:
    """The first layer that gradients run through."""
    if adapted or model.trainable_paths is None or "embed_tokens/embedding" in model.trainable_paths:
        return 0
    groups = group_layers(model.segments)
    moved = {int(path.split("/")[1]) for path in model.trainable_paths if path.startswith("layers/")}
    return min((layer for group in moved for layer in groups[group]), default=sum(map(len, groups)))


def _attention_groups_of(attention: Attention, layers: tuple[int, ...], first: int) -> AttentionGroup:
    shape = attention.shape
    reached = sum(layer >= first for layer in layers)
    return AttentionGroup(
        layers=len(layers),
        reached=reached,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        window=shape.form.window,
    )
