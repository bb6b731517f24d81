"""A critic: adapters and a score head of its own on the base of a model, which predict the return from each position.

It is in the slot `Decoder.value` and is trained beside the model's own adapters; the base's arrays exist once.
"""

# B batch, S sequence, D model

import dataclasses
from collections.abc import Mapping

import jax
from flax import nnx

from jaxft.adapters.attach import AdapterParam, adapters, detach, set_adapter, slots
from jaxft.adapters.make import attach_adapter
from jaxft.config import AdapterConfig
from jaxft.data.batch import Batch
from jaxft.errors import ModelError
from jaxft.nn.adapter import LayerAdapter
from jaxft.nn.decoder import Decoder
from jaxft.nn.score import ScoreHead

SLOT = "adapter"


class Critic(nnx.Module):
    """Adapters by the paths of their layers, and the head, whose predictions are 0 at the start.

    The adapter of layer `layers/0/self_attn/q_proj` is at `layers/0/self_attn/q_proj/adapter`, as in the model.
    """

    def __init__(self, modules: Mapping[str, LayerAdapter], width: int) -> None:
        """modules: adapters by layer. width: D."""
        tree: dict[str, object] = {}
        for path, adapter in modules.items():
            node = tree
            for name in path.split("/"):
                node = node.setdefault(name, {})  # type: ignore[assignment]
            node[SLOT] = adapter
        for name, part in tree.items():
            setattr(self, name, _as_modules(part))
        self.head = ScoreHead(width)
        self.head.weight = AdapterParam(self.head.weight.get_value())

    def __call__(self, hidden_BSD: jax.Array) -> jax.Array:
        """values_BS, float32, from hidden vectors that the model computed with the critic's adapters in its layers."""
        return self.head(hidden_BSD)

    def adapters(self) -> dict[str, LayerAdapter]:
        """The adapters by the paths of their layers."""
        parts = {path: part for path, part in nnx.iter_modules(self) if isinstance(part, LayerAdapter)}
        return {"/".join(map(str, path[:-1])): part for path, part in parts.items()}


def _as_modules(part: object) -> object:
    if not isinstance(part, dict):
        return part
    return nnx.Dict({name: _as_modules(inner) for name, inner in part.items()})


def attach_critic(model: Decoder, config: AdapterConfig, seed: int) -> None:
    """Gives a model a critic with adapters of the configured kind and size, and other draws than the model's own.

    Its adapters start without an effect, as LoRA's do by default. An LM head has none, since it makes no prediction.
    Raises what `attach_adapter` raises.
    """
    fresh = nnx.merge(*nnx.split(model))
    detach(fresh)
    attach_adapter(fresh, dataclasses.replace(config, init_lora_weights="default"), seed + 1)
    own = {path: adapter for path, adapter in adapters(fresh).items() if path != "lm_head"}
    model.value = Critic(own, model.config.hidden_size)


def critic_values(model: Decoder, batch: Batch[jax.Array]) -> jax.Array:
    """What the critic predicts at every position: the return from the next token on, [B, S] float32.

    The model runs with the critic's adapters in the place of its own. Raises ModelError if it has no critic.
    """
    # A model of its own with the same arrays: `model` keeps its adapters.
    copy = nnx.merge(*nnx.split(model))
    if not isinstance(copy.value, Critic):
        raise ModelError("the model has no critic, so there is nothing that predicts returns")
    own = copy.value.adapters()
    for path, layer in slots(copy):
        if path in own:
            set_adapter(layer, own[path])
        else:
            layer.adapter = nnx.data(None)
    hidden_BSD, _ = copy(batch.tokens_BS, batch.positions_BS, batch.segments_BS, whole=batch.whole)
    return copy.value(hidden_BSD)


def without_critic(model: Decoder) -> Decoder:
    """The model alone, on the same arrays; `model` itself if it has no critic."""
    if not isinstance(model.value, Critic):
        return model
    alone = nnx.merge(*nnx.split(model))
    drop_critic(alone)
    return alone


def drop_critic(model: Decoder) -> None:
    """Takes the critic out of a model, if it has one."""
    if isinstance(model.value, Critic):
        model.value = nnx.data(None)
