"""Experts on many devices: each routes its own rows; only weights and, between experts' devices, rows travel.

Written out under `jax.shard_map`, since the compiler, left alone with a grouped multiplication, gathers the rows of the
whole batch on every device. No expert has a capacity here either: the result is that of one device.

A device holds the rows of its part of the batch and, of the E experts, those of its place along `expert`, split along
the model dimension over `fsdp`. What travels for a layer in the forward pass (the backward pass sends as much the other
way):

- over `fsdp`, the weights of the device's experts, gathered in the type of computation; their gradient is reduced and
  scattered, and added up over `data`.
- over `expert`, where it has e > 1 places, the rows of e devices and their choices, gathered; every device answers for
  its own experts in float32, and the answers are added up and scattered to where the rows came from. So each row meets
  all e places whatever it chose, where an exchange of chosen rows would send it to at most K: cheap while e is small.

The buffer of sorted rows has room for all rows choosing experts of one device, e * M * min(K, E / e) of them. It is
mostly empty when they choose evenly, and a grouped multiplication need not compute what is empty.
"""

# D model, F inner, E experts, K experts of one token, M tokens of a device, N tokens of all places along `expert`,
# R rows of the buffer

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jaxft.nn.mesh_axes import EXPERT, FSDP, rows_axes
from jaxft.trees import path_str

# How the layer's parameters come in: as `jaxft.sharding.rules` has them, so that nothing moves on the way.
KERNELS = {
    "router/kernel": P(FSDP, None),  # [D, E]
    "gate_proj/kernel": P(EXPERT, FSDP, None),  # [E, D, F]
    "up_proj/kernel": P(EXPERT, FSDP, None),  # [E, D, F]
    "gate_up_proj/kernel": P(EXPERT, FSDP, None),  # [E, D, 2F]
    "down_proj/kernel": P(EXPERT, None, FSDP),  # [E, F, D]
    "gate_up_proj/bias": P(EXPERT, FSDP),  # [E, 2F]
    "down_proj/bias": P(EXPERT, FSDP),  # [E, D]
}


def on_mesh(
    work: Callable[[nnx.Module, jax.Array], Any], layer: nnx.Module, x_MD: jax.Array, mesh: AbstractMesh
) -> Any:
    """`work(layer, x_MD)` by every device on its own rows, its layer holding the experts of its place alone.

    layer: parameters of `router`, and of others whose first dimension is E. work: gives arrays [M, ...].
    """
    graphdef, state = nnx.split(layer)
    flat, treedef = jax.tree_util.tree_flatten_with_path(state)
    specs = [_spec(path_str(path), x.shape, mesh) for path, x in flat]
    rows = P(rows_axes(mesh))

    def local(leaves: list[jax.Array], x_MD: jax.Array) -> Any:
        whole = [_gather(x, spec, layer.dtype) for x, spec in zip(leaves, specs, strict=True)]
        return work(nnx.merge(graphdef, treedef.unflatten(whole)), x_MD)

    apply = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, rows), out_specs=rows, axis_names=frozenset(rows_axes(mesh))
    )
    return apply([x for _, x in flat], x_MD)


def places(mesh: AbstractMesh) -> int:
    """Among how many devices the experts are divided."""
    return mesh.shape.get(EXPERT, 1)


def together(
    experts: Callable[[jax.Array, jax.Array], jax.Array],
    count: int,
    x_MD: jax.Array,
    weights_MK: jax.Array,
    experts_MK: jax.Array,
) -> jax.Array:
    """The weighted sum of what the chosen experts give, each at its place along `expert` -> [M, D] float32.

    experts(x_RD, sizes) -> [R, D]: this device's `count` experts on rows sorted by them, those past the last being no
    rows. To be called under `on_mesh`.
    """
    x_ND, weights_NK, experts_NK = (
        jax.lax.all_gather(given, EXPERT, tiled=True) for given in (x_MD, weights_MK, experts_MK)
    )
    chosen = experts_NK.shape[1]
    own = experts_NK.reshape(-1) - count * jax.lax.axis_index(EXPERT)
    own = jnp.where((own >= 0) & (own < count), own, count)  # `count`: of another place, sorted behind the own ones
    # A token chooses an expert once: no more than `count` of its choices are here.
    order_R = jnp.argsort(own, stable=True)[: len(x_ND) * min(chosen, count)]
    sizes = jnp.bincount(own, length=count + 1)[:count].astype(jnp.int32)
    tokens_R = order_R // chosen
    filled_R1 = (jnp.arange(len(order_R)) < sizes.sum())[:, None]
    # Both ways: what a grouped multiplication leaves in empty rows, or in their gradient, is not said.
    rows_RD = jnp.where(filled_R1, x_ND[tokens_R], 0)
    rows_RD = jnp.where(filled_R1, experts(rows_RD, sizes).astype(jnp.float32), 0)
    rows_RD = rows_RD * weights_NK.reshape(-1)[order_R][:, None]
    y_ND = jnp.zeros(x_ND.shape, jnp.float32).at[tokens_R].add(rows_RD)
    return jax.lax.psum_scatter(y_ND, EXPERT, tiled=True)


def _spec(path: str, shape: tuple[int, ...], mesh: AbstractMesh) -> P:
    """Whole along `fsdp` where that does not divide a dimension, as the rules leave small arrays whole."""
    *_, module, name = path.split("/")
    spec = KERNELS.get(f"{module}/{name}", P() if module == "router" else P(EXPERT))
    return P(*(axis if _splits(axis, length, mesh) else None for axis, length in zip(spec, shape, strict=False)))


def _splits(axis: str | None, length: int, mesh: AbstractMesh) -> bool:
    # Experts that do not divide are no case for leaving whole: shard_map says so, runs before.
    count = mesh.shape.get(axis, 1)
    return count > 1 and (axis == EXPERT or length % count == 0)


def _gather(x: jax.Array, spec: P, dtype: jnp.dtype) -> jax.Array:
    x = x.astype(dtype)  # before it travels
    for dimension, axis in enumerate(spec):
        if axis == FSDP:
            x = jax.lax.all_gather(x, FSDP, axis=dimension, tiled=True)
    return x
