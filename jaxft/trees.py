"""Paths of arrays in nested states."""

from collections.abc import Callable, Sequence
from typing import Any

import jax


def path_str(key_path: Sequence[Any]) -> str:
    """`layers/0/q_proj/kernel` for a jax.tree_util key path (dicts, NamedTuples, dataclasses, nnx.State)."""
    # An nnx.Variable is a node with the one field `value`.
    shown = (key for key in key_path if not (isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value"))
    return jax.tree_util.keystr(tuple(shown), simple=True, separator="/")


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[dict[str, Any], Any]:
    """(leaves by path in tree order, treedef). is_leaf: true for nodes that are not descended into."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {path_str(path): leaf for path, leaf in flat}, treedef


def is_key(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether an array, which may be abstract, holds PRNG keys."""
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
