"""Experts on many devices: each routes its own rows; only weights and, between experts' devices, rows travel.

Written out under `jax.shard_map`, since the compiler, left alone with a grouped multiplication, gathers the rows of the
whole batch on every device. No expert has a capacity here either: the result is that of one device.

A device holds its part of the batch's tokens, which the context and tensor axes split too, and, of the E experts, those
of its place along `expert`, split along both sides over the other axes. What travels for a layer in the forward pass
(the backward pass sends as much the other way):

- over `fsdp`, `context` and `tensor`, the weights of the device's experts, gathered in the type of computation; their
  gradient is reduced and scattered, and added up over `slice` and `data`.
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
from jax.sharding import PartitionSpec as P

from jaxft.nn import partition
from jaxft.quant import kernel_path
from jaxft.trees import path_str

EXPERT = "expert"
ROWS = ("batch", "stream", None)
# What the inputs and outputs of a layer of experts are.
EXPERT_SIDES = {
    "gate_proj": ("expert_weight", "tensor"),
    "up_proj": ("expert_weight", "tensor"),
    "gate_up_proj": ("expert_weight", "tensor"),
    "down_proj": ("tensor", "expert_weight"),
}
# What the dimensions of the layer's parameters are, as `jaxft.sharding.rules` splits them, so that nothing moves on the
# way in.
STORED = {
    "router/kernel": ("weight", None),  # [D, E]
    "gate_proj/kernel": ("expert", "expert_weight", "tensor"),  # [E, D, F]
    "up_proj/kernel": ("expert", "expert_weight", "tensor"),  # [E, D, F]
    "gate_up_proj/kernel": ("expert", "expert_weight", "tensor"),  # [E, D, 2F]
    "down_proj/kernel": ("expert", "tensor", "expert_weight"),  # [E, F, D]
    "gate_up_proj/bias": ("expert", None),  # [E, 2F]
    "down_proj/bias": ("expert", None),  # [E, D]
    **{
        f"{name}/adapter/{half}": ("expert", None, wide)  # [E, r, D], [E, r, F]
        for name, sides in EXPERT_SIDES.items()
        for side, wide in zip("ab", sides, strict=True)
        for half in (f"lora_{side}", f"lora_{side}_start")
    },
}


def divides(shape: tuple[int, ...]) -> bool:
    """Whether there is an ambient mesh whose devices each take equally many tokens of [B, S, D]."""
    return not partition.is_unsharded() and not any(
        length % partition.shards(name) for length, name in zip(shape, ROWS, strict=True) if name is not None
    )


def on_mesh(work: Callable[[nnx.Module, jax.Array], Any], layer: nnx.Module, x_BSD: jax.Array) -> Any:
    """`work(layer, x_MD)` by every device on its own tokens, its layer holding the experts of its place alone.

    layer: parameters of `router`, and of others whose first dimension is E. work: gives arrays [M, ...], which come
    back as [B, S, ...].
    """
    graphdef, state = nnx.split(layer)
    flat, treedef = jax.tree_util.tree_flatten_with_path(state)
    paths = [path_str(path) for path, _ in flat]
    stored = [_stored(path, x.ndim) for path, (_, x) in zip(paths, flat, strict=True)]
    types = [layer.dtype if kernel_path(path) == path else x.dtype for path, (_, x) in zip(paths, flat, strict=True)]
    # Whole where the axes do not divide a dimension, as the rules leave small arrays whole.
    specs = [partition.spec(x.shape, dimensions, uneven=None) for (_, x), dimensions in zip(flat, stored, strict=True)]
    rows = partition.spec(x_BSD.shape, ROWS)

    def local(leaves: list[jax.Array], x_BSD: jax.Array) -> Any:
        # Weights in the type that they are used in, codes as they are.
        cast = [x.astype(dtype) for x, dtype in zip(leaves, types, strict=True)]
        whole = [_gather(x, spec, dimensions) for x, spec, dimensions in zip(cast, specs, stored, strict=True)]
        done = work(nnx.merge(graphdef, treedef.unflatten(whole)), x_BSD.reshape(-1, x_BSD.shape[-1]))
        return jax.tree.map(lambda y: y.reshape(*x_BSD.shape[:2], *y.shape[1:]), done)

    apply = jax.shard_map(local, in_specs=(specs, rows), out_specs=P(*rows[:2]))
    return apply([x for _, x in flat], x_BSD)


def places() -> int:
    """Among how many devices the experts are divided."""
    return partition.shards("expert")


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


def _stored(path: str, dimensions: int) -> tuple[partition.Dimension | None, ...]:
    if path.endswith(("/scales/largest", "/scales/mean")):  # of an expert's compressed scales
        return ("expert",) + (None,) * (dimensions - 1)
    return STORED.get(kernel_path(path), (None,) * dimensions)


def _gather(x: jax.Array, spec: P, stored: tuple[partition.Dimension | None, ...]) -> jax.Array:
    for dimension, (entry, name) in enumerate(zip(spec, stored, strict=True)):
        axes = partition.mesh_axes(entry)
        if axes and name != EXPERT:  # a device's experts are its own
            x = jax.lax.all_gather(x, axes, axis=dimension, tiled=True)
    return x
