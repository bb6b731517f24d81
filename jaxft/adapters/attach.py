"""Attaching adapters to a model's linear layers by name, and merging them into the base."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.errors import ModelError, did_you_mean
from jaxft.nn.linear import Linear

ALL_LINEAR = "all-linear"
# Called with the layer and a key.
MakeAdapter = Callable[[Linear, jax.Array], nnx.Module]


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear layer with its path, such as `layers/0/self_attn/q_proj`, in a stable order."""
    found = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}
    yield from sorted(found.items())


def attach(model: nnx.Module, targets: Sequence[str], make: MakeAdapter, key: jax.Array) -> tuple[str, ...]:
    """Puts an adapter into the slot of each target and returns their paths.

    targets: last names of layers (`q_proj`), path endings (`self_attn/q_proj`), or `all-linear`, which
    leaves the LM head out. Raises ModelError for a target that matches nothing.
    """
    layers = dict(linears(model))
    chosen = {path for target in targets for path in _matching(target, layers)}
    for path in sorted(chosen):
        layers[path].adapter = make(layers[path], jax.random.fold_in(key, zlib.crc32(path.encode())))
    return tuple(sorted(chosen))


def adapters(model: nnx.Module) -> dict[str, Any]:
    """The adapter of every layer that has one, by the layer's path."""
    return {path: layer.adapter for path, layer in linears(model) if layer.adapter is not None}


def merge(model: nnx.Module) -> None:
    """Adds every adapter to its kernel, computed in float32, and empties the slots."""
    for _, layer in linears(model):
        if layer.adapter is None:
            continue
        kernel = layer.kernel.get_value()
        merged = kernel.astype(jnp.float32) + layer.adapter.delta()
        layer.kernel.set_value(merged.astype(kernel.dtype))
        layer.adapter = nnx.data(None)


def _matching(target: str, layers: dict[str, Linear]) -> list[str]:
    if target == ALL_LINEAR:
        return [path for path in layers if path.rsplit("/", 1)[-1] != "lm_head"]
    found = [path for path in layers if path == target or path.endswith("/" + target)]
    if not found:
        names = sorted({path.rsplit("/", 1)[-1] for path in layers})
        raise ModelError(
            f"adapter target {target!r} matches no linear layer.{did_you_mean(target, names)} "
            f"This model has {', '.join(names)}; 'all-linear' takes all but lm_head."
        )
    return found
