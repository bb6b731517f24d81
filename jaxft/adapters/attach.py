"""Attaching adapters to a model's linear layers by name, and merging them into the base."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.errors import ModelError, did_you_mean
from jaxft.nn.adapter import bind_shared
from jaxft.nn.experts.layer import ExpertLinear
from jaxft.nn.linear import Embedding, Linear
from jaxft.quant import dense, is_quantized

ALL_LINEAR = "all-linear"
Layer = Linear | Embedding | ExpertLinear  # what has a slot


class AdapterParam(nnx.Param):
    """A parameter that moves while the base stands still."""


class SavedParam(AdapterParam):
    """A parameter of the base that is trained whole beside adapters, and goes where they go."""


class StartParam(nnx.Param):
    """What an adapter began with and is counted from: it stands still, but is no part of the base on disk."""


# Called with the layer and a key.
MakeAdapter = Callable[[Linear, jax.Array], nnx.Module]


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear layer with its path, such as `layers/0/self_attn/q_proj`, in a stable order."""
    yield from ((path, layer) for path, layer in slots(model) if isinstance(layer, Linear))


def slots(model: nnx.Module) -> Iterator[tuple[str, Layer]]:
    """Every layer that has a slot for an adapter, with its path, in a stable order."""
    found = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Layer)}
    yield from sorted(found.items())


def weight(layer: Layer) -> nnx.Param:
    """The matrix that a layer's adapter is beside."""
    return layer.embedding if isinstance(layer, Embedding) else layer.kernel


def attach(model: nnx.Module, targets: Sequence[str], make: MakeAdapter, key: jax.Array) -> tuple[str, ...]:
    """Puts an adapter into the slot of each target and returns their paths.

    targets: as for `find`. Raises ModelError for a target that matches nothing.
    """
    found = find(model, targets)
    for path, layer in found.items():
        layer.adapter = make(layer, key_of(key, path))
    return tuple(found)


def find(
    model: nnx.Module, targets: Sequence[str], *, exclude: Sequence[str] = (), kinds: Any = Linear
) -> dict[str, Layer]:
    """The layers of a type that targets name and exclude does not, by path.

    targets, exclude: last names of layers (`q_proj`), path endings (`self_attn/q_proj`), or `all-linear`, every Linear
    but the LM head. Raises ModelError for one that matches nothing.
    """
    layers = {path: layer for path, layer in slots(model) if isinstance(layer, kinds)}
    chosen = {path for target in targets for path in _matching(target, layers, model)}
    chosen -= {path for name in exclude for path in _matching(name, layers, model)}
    return {path: layers[path] for path in sorted(chosen)}


def key_of(key: jax.Array, path: str) -> jax.Array:
    """The key of the adapter at a path: whatever else has one, it is the same."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def adapters(model: nnx.Module) -> dict[str, Any]:
    """The adapter of every layer that has one, by the layer's path."""
    return {path: layer.adapter for path, layer in slots(model) if layer.adapter is not None}


def virtual(model: nnx.Module) -> dict[str, Any]:
    """The prompt of a model, or the prefix of every stack of layers, by the path of its slot."""
    found = {} if model.prompt is None else {"prompt": model.prompt}
    for index, group in enumerate(model.layers):
        if group.self_attn.prefix is not None:
            found[f"layers/{index}/self_attn/prefix"] = group.self_attn.prefix
    return found


def mergeable(model: nnx.Module) -> dict[str, Any]:
    """`adapters`, each with what the model lends it, ready to be made a part of its layer.

    Raises ModelError where the model has virtual tokens, which are no change of any weight, and for an adapter on a
    table that is the LM head too: merged, it would move the head as well.
    """
    if model.lm_head is None and model.embed_tokens.adapter is not None:
        raise ModelError(
            "the adapter on embed_tokens cannot be merged: in this model the table is the LM head too "
            "(tie_word_embeddings), which the adapter does not move. Export it as an adapter."
        )
    if virtual(model):
        raise ModelError(
            f"the model begins its rows with {model.virtual_tokens} virtual tokens, which cannot be merged into its "
            "weights: write the adapter by itself (--format=adapter)"
        )
    found = adapters(model)
    if model.shared is not None:
        found = {path: nnx.merge(*nnx.split(adapter)) for path, adapter in found.items()}
        for adapter in found.values():
            bind_shared(adapter, model.shared.arrays(jnp.float32))
    return found


def mergings(model: nnx.Module) -> dict[str, Callable[..., jax.Array]]:
    """`merged(value, at)` of every parameter that an adapter changes, by the parameter's path.

    at: the place in the stack that `value` is of. Raises ModelError as `mergeable` does.
    """
    out, layers = {}, dict(slots(model))
    for path, adapter in mergeable(model).items():
        out[f"{path}/{'embedding' if isinstance(layers[path], Embedding) else 'kernel'}"] = adapter.merged
        if getattr(layers[path], "bias", None) is not None:
            out[f"{path}/bias"] = adapter.merged_bias
    return out


def detach(model: nnx.Module) -> None:
    """Empties every slot: what is left is the base."""
    for _, layer in slots(model):
        layer.adapter = nnx.data(None)
    for group in model.layers:
        group.self_attn.prefix = nnx.data(None)
    model.prompt, model.shared, model.virtual_tokens = nnx.data(None), nnx.data(None), 0


def merge(model: nnx.Module) -> None:
    """Makes every adapter a part of its matrix, computed in float32, and empties the slots.

    A quantised kernel becomes a dense one, in the type of computation.
    """
    layers = dict(slots(model))
    for path, adapter in mergeable(model).items():
        _merge_into(weight(layers[path]), adapter.merged, layers[path].dtype)
        if getattr(layers[path], "bias", None) is not None:
            _merge_into(layers[path].bias, adapter.merged_bias, layers[path].dtype)
    detach(model)


def _merge_into(param: nnx.Param, merged: Callable[[jax.Array], jax.Array], computed: jnp.dtype) -> None:
    value = param.get_value()
    param.set_value(merged(dense(value, jnp.float32)).astype(computed if is_quantized(value) else value.dtype))


def _matching(target: str, layers: dict[str, Layer], model: nnx.Module) -> list[str]:
    if target == ALL_LINEAR:
        return [path for path, layer in layers.items() if isinstance(layer, Linear) and path != "lm_head"]
    found = [path for path in layers if path == target or path.endswith("/" + target)]
    if not found:
        names = sorted({path.rsplit("/", 1)[-1] for path in layers})
        tied = target == "lm_head" and model.lm_head is None
        why = " Its LM head is embed_tokens (tie_word_embeddings)." if tied else did_you_mean(target, names)
        raise ModelError(
            f"adapter target {target!r} matches no layer.{why} "
            f"This model has {', '.join(names)}; 'all-linear' takes all Linear layers but lm_head."
        )
    return found
