"""The LoRA family: chooses the layers that get an adapter, its rank and its form.

The forms are in `low_rank` (LoRA), `dora`, `embedding` and `experts`; `start` and `eva` draw their initial values.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax

from jaxft.adapters.attach import LAYERS, Layer, MakeAdapter, find, key_of, set_adapter, weight
from jaxft.adapters.dropout import described
from jaxft.adapters.lora.dora import DoRA
from jaxft.adapters.lora.embedding import EmbeddingLoRA
from jaxft.adapters.lora.experts import ExpertLoRA
from jaxft.adapters.lora.low_rank import LoRA as LoRA
from jaxft.adapters.lora.low_rank import LoRASettings as LoRASettings
from jaxft.adapters.lora.low_rank import LowRank
from jaxft.adapters.lora.start import starts_nonzero
from jaxft.config import AdapterConfig
from jaxft.errors import ModelError
from jaxft.files.patterns import matches
from jaxft.nn.decoder import Decoder
from jaxft.nn.experts.layer import ExpertLinear
from jaxft.nn.linear import Embedding, Linear
from jaxft.nn.per_layer import inputs as per_layer
from jaxft.nn.residual import altup
from jaxft.nn.stack import group_layers

_LAYER = re.compile(r"model\.layers\.(\d+)\..*")


def attach_to(model: Decoder, config: AdapterConfig, key: jax.Array) -> None:
    """Attaches fresh LoRA to the layers that a config names.

    Raises ModelError if the model lacks a named layer, if a pattern fits no module, and if a layer cannot have the form
    or the rank.
    """
    settings = LoRASettings(
        r=config.r,
        alpha=config.alpha,
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init=config.init_lora_weights,
    )
    layers = find(model, config.targets, exclude=config.excluded, kinds=LAYERS)
    if "embed_tokens" in layers and model.tied:
        raise ModelError(
            "adapter.target_modules names embed_tokens, which is the LM head too (tie_word_embeddings): an adapter "
            "would change the embeddings alone and could not be merged. "
            "adapter.modules_to_save='embed_tokens' trains both."
        )
    count = sum(map(len, group_layers(model.segments)))
    absent = [i for i in config.layers or () if i >= count]
    if absent:
        raise ModelError(f"adapter.layers_to_transform names layer {absent[0]}; the model has 0 to {count - 1}")
    names = {path: module_names(model, path) for path in layers}
    check_patterns((*config.ranks, *config.alphas), [name for each in names.values() for name in each])
    for path, layer in layers.items():
        stack_settings = [
            settings_for(settings, name, config.ranks, config.alphas) if in_layers(name, config.layers) else None
            for name in names[path]
        ]
        if any(stack_settings):
            set_adapter(layer, make_lora(layer, stack_settings, key_of(key, path)))


def describe(config: AdapterConfig) -> str:
    """For people: `LoRA r=16 on all-linear`."""
    kind = "DoRA" if config.use_dora else "LoRA"
    return f"{kind} r={config.r} on {config.target_modules}{described(config.dropout)}"


def lora_factory(settings: LoRASettings) -> MakeAdapter:
    """A function for `attach`: `(layer, key) -> LoRA` with the layer's sizes. It raises what `make_lora` raises."""
    return lambda layer, key: make_lora(layer, (settings,), key)


def make_lora(layer: Layer, stack_settings: Sequence[LoRASettings | None], key: jax.Array) -> LowRank | EmbeddingLoRA:
    """A fresh adapter for a layer.

    stack_settings: the settings at each stack index, or one for all; None leaves a layer out. Raises ModelError if the
    rank exceeds the layer's, and for settings that the layer's form of LoRA does not have.
    """
    kernel = weight(layer).get_value()
    *stack, inputs, outputs = kernel.shape
    chosen = [settings for settings in stack_settings if settings is not None]
    settings = dataclasses.replace(chosen[0], r=max(each.r for each in chosen))
    if settings.r > min(inputs, outputs):
        raise ModelError(
            f"adapter.r={settings.r} exceeds a layer of {inputs} x {outputs}: its rank is at most "
            f"{min(inputs, outputs)}. Lower adapter.r or leave the layer out of adapter.target_modules."
        )
    if not isinstance(layer, Linear):
        _check_form(layer, settings)
    if isinstance(layer, Embedding):
        return EmbeddingLoRA(inputs, outputs, settings, key=key)
    form: type[LoRA | ExpertLoRA] = DoRA if settings.use_dora else LoRA
    if isinstance(layer, ExpertLinear):
        form = ExpertLoRA
    return form(
        inputs,
        outputs,
        settings,
        stack=tuple(stack),
        stack_settings=None if len(set(stack_settings)) == 1 else stack_settings,
        kernel=kernel,
        tp_side=layer.tp_side,
        key=key,
    )


def module_names(model: Decoder, path: str) -> tuple[str, ...]:
    """The names of the layer at a path in each decoder layer: `model.layers.3.self_attn.q_proj`."""
    if not path.startswith("layers/"):
        for prefix in (per_layer.PREFIX, altup.PREFIX):
            if path.startswith(prefix):
                return (f"model.{path.removeprefix(prefix).replace('/', '.')}",)
        return (f"model.{path}" if path == "embed_tokens" else path,)
    _, group, rest = path.split("/", 2)
    return tuple(f"model.layers.{i}.{rest.replace('/', '.')}" for i in group_layers(model.segments)[int(group)])


def settings_for(
    settings: LoRASettings, name: str, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> LoRASettings:
    """The settings of the module with this name. Rank and alpha come from the first pattern that fits its end."""
    r = next((r for pattern, r in ranks.items() if fits(pattern, name)), settings.r)
    alpha = next((alpha for pattern, alpha in alphas.items() if fits(pattern, name)), settings.alpha)
    return dataclasses.replace(settings, r=r, alpha=float(alpha))


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises ModelError for a pattern that fits no module that gets an adapter."""
    for pattern in patterns:
        if not any(fits(pattern, name) for name in names):
            ends = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ModelError(f"the pattern {pattern!r} fits no module that gets an adapter: {', '.join(ends)}")


def fits(pattern: str, name: str) -> bool:
    """Whether a regular expression matches a module's name, or its end after a dot, as in PEFT."""
    return matches(rf"(.*\.)?({pattern})$", name, whole=False)


def in_layers(name: str, layers: Sequence[int] | None) -> bool:
    """Whether a module is in one of these decoder layers; False for a module outside all layers. None: always True."""
    layer = _LAYER.fullmatch(name)
    return layers is None or (layer is not None and int(layer[1]) in layers)


def _check_form(layer: Layer, settings: LoRASettings) -> None:
    name = "embed_tokens" if isinstance(layer, Embedding) else "experts"
    if settings.use_dora:
        raise ModelError(f"adapter.use_dora is not for {name}, only for single matrices: leave them out of the targets")
    if isinstance(layer, Embedding) and starts_nonzero(settings.init):
        raise ModelError(f"adapter.init_lora_weights={settings.init!r} is for matrices: leave embed_tokens out")
    if isinstance(layer, ExpertLinear) and settings.dropout:
        raise ModelError(f"adapter.dropout={settings.dropout} does not reach experts: set it to 0, or leave them out")
