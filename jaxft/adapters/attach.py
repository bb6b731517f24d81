"""Attaching adapters to layers that are chosen by name, and merging adapters into the base."""

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.errors import ModelError, did_you_mean
from jaxft.nn.adapter import LayerAdapter, bind_shared
from jaxft.nn.attention.layer import Prefix
from jaxft.nn.decoder import Decoder, Prompt
from jaxft.nn.experts.layer import ExpertLinear
from jaxft.nn.linear import Embedding, Linear
from jaxft.quant import dense, is_quantized

ALL_LINEAR = "all-linear"
_NUMBER = re.compile(r"/\d+$")  # of a layer in a list of layers
Layer = Linear | Embedding | ExpertLinear  # the layers that have a slot for an adapter
LAYERS: tuple[type[Layer], ...] = (Linear, Embedding, ExpertLinear)


class AdapterParam(nnx.Param):
    """A trainable parameter of an adapter, whose base is frozen."""


class SavedParam(AdapterParam):
    """A parameter of the base that is trained in full together with adapters, and is saved with them."""


class CarriedParam(nnx.Param):
    """A parameter of the base that an adapter's folder replaces. It is frozen, and written with the adapter."""


class StartParam(nnx.Param):
    """The initial value from which an adapter's effect is measured. It is frozen, but not part of the base on disk."""


VirtualTokens = Prompt | Prefix
# Called with the layer and a key.
MakeAdapter = Callable[[Layer, jax.Array], LayerAdapter]


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear layer with its path, such as `layers/0/self_attn/q_proj`, in a stable order."""
    yield from ((path, layer) for path, layer in slots(model) if isinstance(layer, Linear))


def slots(model: nnx.Module) -> Iterator[tuple[str, Layer]]:
    """Every layer that has a slot for an adapter, with its path, in a stable order."""
    layers = {
        "/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, LAYERS)
    }
    yield from sorted(layers.items())


def weight(layer: Layer) -> nnx.Param:
    """The matrix that a layer's adapter changes."""
    return layer.embedding if isinstance(layer, Embedding) else layer.kernel


def attach(model: Decoder, targets: Sequence[str], make: MakeAdapter, key: jax.Array) -> tuple[str, ...]:
    """Puts an adapter into the slot of each target and returns the layers' paths.

    targets: as for `find`. Raises ModelError for a target that matches no layer.
    """
    layers = find(model, targets)
    for path, layer in layers.items():
        set_adapter(layer, make(layer, key_of(key, path)))
    return tuple(layers)


def set_adapter(layer: Layer, adapter: LayerAdapter) -> None:
    """Puts an adapter into a layer's slot. It must be of the class for that layer: see `jaxft.nn.adapter`."""
    layer.adapter = cast(Any, adapter)


def find(
    model: Decoder,
    targets: Sequence[str],
    *,
    exclude: Sequence[str] = (),
    kinds: tuple[type[Layer], ...] = (Linear,),
) -> dict[str, Layer]:
    """The layers of a type that `targets` names and `exclude` does not, by path.

    targets, exclude: last names of layers (`q_proj`), path endings (`self_attn/q_proj`), or `all-linear`, every Linear
    but the LM head and the small ones of recurrent layers and of AltUp. Of layers in a list, the list's name is enough.
    Raises ModelError for a name that matches no layer.
    """
    layers = {path: layer for path, layer in slots(model) if isinstance(layer, kinds)}
    chosen = {path for target in targets for path in _matching(target, layers, model)}
    chosen -= {path for name in exclude for path in _matching(name, layers, model)}
    return {path: layers[path] for path in sorted(chosen)}


def key_of(key: jax.Array, path: str) -> jax.Array:
    """The PRNG key of the adapter at a path. It does not depend on other adapters."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def adapters(model: nnx.Module) -> dict[str, LayerAdapter]:
    """The adapter of every layer that has one, by the layer's path."""
    return {path: layer.adapter for path, layer in slots(model) if layer.adapter is not None}


def virtual_modules(model: Decoder) -> dict[str, VirtualTokens]:
    """The prompt of a model, or the prefix of every stack of layers, by the path of its slot."""
    modules: dict[str, VirtualTokens] = {} if model.prompt is None else {"prompt": model.prompt}
    for index, group in enumerate(model.layers):
        if group.attention is not None and group.attention.prefix is not None:
            modules[f"layers/{index}/{group.mixer_name}/prefix"] = group.attention.prefix
    return modules


def mergeable_adapters(model: Decoder) -> dict[str, LayerAdapter]:
    """`adapters`, each with the arrays that the model shares with it, ready to be merged into its layer.

    Raises ModelError if the model has virtual tokens, which change no weight, an adapter on an embedding table that is
    also the LM head (merging would change the head too), or one with a bias on a layer without.
    """
    if model.tied and model.embed_tokens.adapter is not None:
        raise ModelError(
            "the adapter on embed_tokens cannot be merged: in this model the embedding table is also the LM head "
            "(tie_word_embeddings), which the adapter does not change. Export it as an adapter."
        )
    if virtual_modules(model):
        raise ModelError(
            f"the model begins its rows with {model.virtual_tokens} virtual tokens, which cannot be merged into its "
            "weights: write the adapter by itself (--format=adapter)"
        )
    attached, layers = adapters(model), dict(slots(model))
    added = [path for path, one in attached.items() if one.adds_bias and getattr(layers[path], "bias", None) is None]
    if added:
        raise ModelError(
            f"the adapter on {added[0]} has a bias (lora_bias), but the layer has none, so the adapter cannot be "
            "merged: write it by itself (--format=adapter)"
        )
    if model.shared is not None:
        attached = {path: nnx.merge(*nnx.split(adapter)) for path, adapter in attached.items()}
        for adapter in attached.values():
            bind_shared(adapter, model.shared.arrays(jnp.float32))
    return attached


def merge_functions(model: Decoder) -> dict[str, Callable[..., jax.Array]]:
    """`merged(value, at)` of every parameter that an adapter changes, by the parameter's path.

    at: the stack index of `value`. Raises ModelError as `mergeable_adapters` does.
    """
    out: dict[str, Callable[..., jax.Array]] = {}
    if model.token_rows is not None:
        out |= model.token_rows.merges()
    layers = dict(slots(model))
    for path, adapter in mergeable_adapters(model).items():
        out[f"{path}/{'embedding' if isinstance(layers[path], Embedding) else 'kernel'}"] = adapter.merged
        if getattr(layers[path], "bias", None) is not None:
            out[f"{path}/bias"] = adapter.merged_bias
    return out


def detach(model: Decoder) -> None:
    """Empties every slot, so that the base model is left."""
    for _, layer in slots(model):
        layer.adapter = nnx.data(None)
    for group in model.layers:
        if group.attention is not None:
            group.attention.prefix = nnx.data(None)
    model.prompt, model.shared, model.virtual_tokens = nnx.data(None), nnx.data(None), 0
    model.token_rows = nnx.data(None)


def merge(model: Decoder) -> None:
    """Merges every adapter into its matrix, in float32, and empties the slots.

    A quantized kernel becomes a dense one in the compute dtype.
    """
    layers = dict(slots(model))
    attached = mergeable_adapters(model)
    for path, merged in ({} if model.token_rows is None else model.token_rows.merges()).items():
        table = model.embed_tokens if model.lm_head is None or path.startswith("embed_tokens") else model.lm_head
        _merge_into(weight(table), merged, model.dtype)
    for path, adapter in attached.items():
        layer = layers[path]
        _merge_into(weight(layer), adapter.merged, layer.dtype)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            _merge_into(bias, adapter.merged_bias, layer.dtype)
    detach(model)


def _merge_into(param: nnx.Param, merged: Callable[[jax.Array], jax.Array], compute_dtype: jnp.dtype) -> None:
    value = param.get_value()
    dtype = compute_dtype if is_quantized(value) else value.dtype
    param.set_value(merged(dense(value, jnp.float32)).astype(dtype))


def last_name(path: str, separator: str = "/") -> str:
    """The last part of a path: `q_proj`. The number of a layer in a list stays with its name: `altup_projections/0`."""
    parts = path.split(separator)
    return separator.join(parts[-2:] if parts[-1].isdecimal() else parts[-1:])


def _in_all_linear(path: str, layer: Layer) -> bool:
    return isinstance(layer, Linear) and layer.in_all_linear and path != "lm_head"


def _matching(target: str, layers: dict[str, Layer], model: Decoder) -> list[str]:
    if target == ALL_LINEAR:
        return [path for path, layer in layers.items() if _in_all_linear(path, layer)]
    ends = {path: (f"/{path}", _NUMBER.sub("", path)) for path in layers}
    paths = [path for path, names in ends.items() if any(name.endswith(f"/{target}") for name in names)]
    if not paths:
        names = sorted({_NUMBER.sub("", path).rsplit("/", 1)[-1] for path in layers})
        tied = target == "lm_head" and model.tied
        why = " Its LM head is embed_tokens (tie_word_embeddings)." if tied else did_you_mean(target, names)
        raise ModelError(
            f"adapter target {target!r} matches no layer.{why} "
            f"This model has {', '.join(names)}; 'all-linear' takes all Linear layers but lm_head."
        )
    return paths
