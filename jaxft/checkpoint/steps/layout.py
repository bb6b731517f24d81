"""A train state as plain arrays by path, as it is written, and the differences between the layouts of two states."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxft.errors import CheckpointError
from jaxft.trees import is_key, path_str


def layout(state: Any) -> dict[str, list[Any]]:
    """Path -> [shape, dtype] of every leaf, as JSON values; PRNG keys have dtypes such as `key<fry>`."""
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in _named(state).items()}


def differences(saved: Mapping[str, list[Any]], wanted: Mapping[str, list[Any]]) -> list[str]:
    """One line for each path whose presence, shape or dtype differs."""
    lines = []
    for path in sorted(saved.keys() | wanted.keys()):
        if path not in wanted:
            lines.append(f"{path}: in the checkpoint ({_show(saved[path])}), not in this run")
        elif path not in saved:
            lines.append(f"{path}: in this run ({_show(wanted[path])}), not in the checkpoint")
        elif saved[path] != wanted[path]:
            lines.append(f"{path}: {_show(saved[path])} in the checkpoint, {_show(wanted[path])} in this run")
    return lines


def as_arrays(state: Any) -> dict[str, jax.Array]:
    """Path -> plain array. PRNG keys become their uint32 data, so that the format holds numbers only.

    Raises CheckpointError for a leaf that is not a jax.Array.
    """
    named = _named(state)
    for path, leaf in named.items():
        if not isinstance(leaf, jax.Array):
            raise CheckpointError(f"{path} is a {type(leaf).__name__}, not a jax.Array: its dtype would not be kept")
    return {path: jax.random.key_data(leaf) if is_key(leaf) else leaf for path, leaf in named.items()}


def abstract_arrays(abstract_state: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of `as_arrays` of such a state, each with the sharding of its leaf (default: one device)."""
    out = {}
    for path, leaf in _named(abstract_state).items():
        plain = (
            jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)) if is_key(leaf) else leaf
        )
        out[path] = jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=_sharding(leaf))
    return out


def as_state(arrays: Mapping[str, jax.Array], abstract_state: Any) -> Any:
    """Inverse of `as_arrays`: the arrays in the tree of abstract_state, PRNG keys typed again."""
    named = _named(abstract_state)
    leaves = [_typed(arrays[path], leaf) if is_key(leaf) else arrays[path] for path, leaf in named.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def _typed(data: jax.Array, leaf: Any) -> jax.Array:
    key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(jnp.empty((), leaf.dtype)))
    return jax.device_put(key, _sharding(leaf))


def _named(state: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    named = {path_str(path): leaf for path, leaf in flat}
    if len(named) != len(flat):
        raise CheckpointError("two leaves of the state have the same path: rename one of them")
    return named


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])


def _show(entry: list[Any]) -> str:
    shape, dtype = entry
    return f"{dtype}{shape}"
