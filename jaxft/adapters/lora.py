"""The LoRA family in a model: which layers get one, of which rank, and of which form.

What a form computes is in `low_rank` (LoRA), `dora`, `lora_embedding` and `lora_experts`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import jax
from flax import nnx

from jaxft.adapters.attach import Layer, find, key_of, weight
from jaxft.adapters.dora import DoRA
from jaxft.adapters.lora_embedding import EmbeddingLoRA
from jaxft.adapters.lora_experts import ExpertLoRA
from jaxft.adapters.lora_start import moves_the_start
from jaxft.adapters.low_rank import LoRA as LoRA
from jaxft.adapters.low_rank import LoRASettings as LoRASettings
from jaxft.adapters.low_rank import low_rank as low_rank
from jaxft.config import AdapterConfig
from jaxft.errors import ModelError
from jaxft.nn.experts.layer import ExpertLinear
from jaxft.nn.linear import Embedding, Linear
from jaxft.nn.stack import group_layers

_LAYER = re.compile(r"model\.layers\.(\d+)\..*")


def put(model: nnx.Module, config: AdapterConfig, key: jax.Array) -> None:
    """Fresh LoRA beside the layers that a run's config names. Raises ModelError for what the model does not have."""
    settings = LoRASettings(
        r=config.r,
        alpha=config.alpha,
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init=config.init_lora_weights,
    )
    found = find(model, config.targets, exclude=config.excluded, kinds=Layer)
    if "embed_tokens" in found and model.lm_head is None:
        raise ModelError(
            "adapter.target_modules names embed_tokens, which is the LM head too (tie_word_embeddings): an adapter "
            "would move the embeddings alone and could not be merged. "
            "adapter.modules_to_save='embed_tokens' trains both."
        )
    count = sum(map(len, group_layers(model.segments)))
    beyond = [i for i in config.layers or () if i >= count]
    if beyond:
        raise ModelError(f"adapter.layers_to_transform names layer {beyond[0]}; the model has 0 to {count - 1}")
    names = {path: place_names(model, path) for path in found}
    check_patterns((*config.ranks, *config.alphas), [name for each in names.values() for name in each])
    for path, layer in found.items():
        places = [
            patterned(settings, name, config.ranks, config.alphas) if in_layers(name, config.layers) else None
            for name in names[path]
        ]
        if any(places):
            layer.adapter = made(layer, places, key_of(key, path))


def beside(settings: LoRASettings) -> Callable[[Layer, jax.Array], nnx.Module]:
    """What `attach` makes a LoRA with: `(layer, key) -> LoRA` of the layer's sizes; see `made` for errors."""
    return lambda layer, key: made(layer, (settings,), key)


def made(layer: Layer, places: Sequence[LoRASettings | None], key: jax.Array) -> nnx.Module:
    """A fresh adapter for a layer. places: the settings at each place of its stack, or one for all; None: left out.

    Raises ModelError where a rank exceeds the layer's, and for what a form does not have.
    """
    kernel = weight(layer).get_value()
    *stack, inputs, outputs = kernel.shape
    given = [place for place in places if place is not None]
    settings = dataclasses.replace(given[0], r=max(place.r for place in given))
    if settings.r > min(inputs, outputs):
        raise ModelError(
            f"adapter.r={settings.r} exceeds a layer of {inputs} x {outputs}: its rank is at most "
            f"{min(inputs, outputs)}. Lower adapter.r or leave the layer out of adapter.target_modules."
        )
    if not isinstance(layer, Linear):
        _check_form(layer, settings)
    if isinstance(layer, Embedding):
        return EmbeddingLoRA(inputs, outputs, settings, key=key)
    more = {"stack": tuple(stack), "kernel": kernel, "tp_side": layer.tp_side, "key": key}
    more["places"] = None if len(set(places)) == 1 else tuple(places)
    if isinstance(layer, ExpertLinear):
        return ExpertLoRA(inputs, outputs, settings, **more)
    return (DoRA if settings.use_dora else LoRA)(inputs, outputs, settings, **more)


def place_names(model: nnx.Module, path: str) -> tuple[str, ...]:
    """What the layer at a path is called in each layer of the model: `model.layers.3.self_attn.q_proj`."""
    if not path.startswith("layers/"):
        return (f"model.{path}" if path == "embed_tokens" else path,)
    _, group, rest = path.split("/", 2)
    return tuple(f"model.layers.{i}.{rest.replace('/', '.')}" for i in group_layers(model.segments)[int(group)])


def patterned(settings: LoRASettings, name: str, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> LoRASettings:
    """The settings of a module of that name, the first pattern that fits its end giving its rank, and its alpha."""
    r, alpha = (
        next((value for pattern, value in values.items() if fits(pattern, name)), None) for values in (ranks, alphas)
    )
    return dataclasses.replace(settings, r=r or settings.r, alpha=settings.alpha if alpha is None else float(alpha))


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises ModelError for a pattern that fits no module that gets an adapter."""
    for pattern in patterns:
        if not any(fits(pattern, name) for name in names):
            ends = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ModelError(f"the pattern {pattern!r} fits no module that gets an adapter: {', '.join(ends)}")


def fits(pattern: str, name: str) -> bool:
    """Whether a regular expression fits a module's name, or its end after a dot, as PEFT has it."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def in_layers(name: str, layers: Sequence[int] | None) -> bool:
    """Whether a module is in one of the layers; what is in no layer is not. None: any module is."""
    layer = _LAYER.fullmatch(name)
    return layers is None or (layer is not None and int(layer[1]) in layers)


def _check_form(layer: Layer, settings: LoRASettings) -> None:
    what = "embed_tokens" if isinstance(layer, Embedding) else "experts"
    if settings.use_dora:
        raise ModelError(f"adapter.use_dora is not for {what}, only for single matrices: leave them out of the targets")
    if isinstance(layer, Embedding) and moves_the_start(settings.init):
        raise ModelError(f"adapter.init_lora_weights={settings.init!r} is for matrices: leave embed_tokens out")
    if isinstance(layer, ExpertLinear) and settings.dropout:
        raise ModelError(f"adapter.dropout={settings.dropout} does not reach experts: set it to 0, or leave them out")
