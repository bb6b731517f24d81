"""Paths of arrays in nested states."""

from collections.abc import Sequence
from typing import Any

import jax


def path_str(key_path: Sequence[Any]) -> str:
    """`layers/0/q_proj/kernel` for a jax.tree_util key path (dicts, NamedTuples, dataclasses, nnx.State)."""
    last = key_path[-1] if key_path else None
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value":
        key_path = key_path[:-1]  # an nnx.Variable is a node with the one field `value`
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """(leaves by path in tree order, treedef)."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return {path_str(path): leaf for path, leaf in flat}, treedef
