"""Quantisation while loading, one layer's tensor at a time. The model as a whole is never kept in its own precision."""

# L stacked layers, E experts, I inputs, O outputs

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jaxft.checkpoint.quantized.bitsandbytes import NF4Source, load_nf4
from jaxft.checkpoint.tensors import TensorSource
from jaxft.models.tensor_map import ParamTensors, Piece
from jaxft.quant import Format, QuantizedArray
from jaxft.quant.nf4 import NF4
from jaxft.quant.scales import CompressedScales, compress, dense_scales

# One of our parameters on this process's devices: (param, source, abstract array, sharding) -> array.
Read = Callable[[ParamTensors, TensorSource, jax.ShapeDtypeStruct, Sharding], jax.Array]


def quantized_array(
    param: ParamTensors,
    source: TensorSource,
    leaf: QuantizedArray,
    shardings: QuantizedArray,
    format: Format,
    read: Read,
    codes: NF4Source | None = None,
) -> QuantizedArray:
    """One of our kernels, quantised.

    leaf: abstract. shardings: of every array in it. read: reads a dense array. codes: the source, if it has NF4 codes
    itself, which are then taken as they are.

    A layer's part is read onto the devices that keep it, in the dtype of the file, quantised there, and written into
    the stack, so that devices hold one dense layer besides the codes. The result is the same for any number of devices
    and processes.
    """
    leaf_shardings = tuple(jax.tree.leaves(shardings))
    keep = _zeros(leaf, leaf_shardings)
    pieces: dict[int | None, list[Piece]] = {}
    for piece in param.pieces:
        pieces.setdefault(piece.layer, []).append(piece)
    for layer, inside in pieces.items():
        stacked = layer is not None
        shape = leaf.shape[1:] if stacked else leaf.shape
        sharding = _of_layer(leaf_shardings[0], shape, leaf.ndim)
        kernel: jax.Array | QuantizedArray
        change: Callable[[Any], QuantizedArray]
        if codes is not None and isinstance(leaf, NF4) and len(inside) == 1 and codes.is_nf4(inside[0].hf):
            kernel, change = load_nf4(codes, inside[0].hf, sharding), _double if format.name == "nf4-dq" else _single
        else:
            part = ParamTensors(param.path, param.transform, tuple(Piece(piece.hf, piece.at[1:]) for piece in inside))
            dtype = jnp.promote_types(source.specs()[inside[0].hf].dtype, jnp.bfloat16)
            kernel, change = read(part, source, jax.ShapeDtypeStruct(shape, dtype), sharding), format.quantize
        keep = _store(keep, kernel, jnp.int32(layer or 0), change, leaf_shardings, stacked)
        jax.block_until_ready(keep)  # otherwise the dense layers accumulate before the device has used them
    return keep


def _single(kernel: NF4) -> NF4:
    return NF4(kernel.codes, dense_scales(kernel.scales))


def _double(kernel: NF4) -> NF4:
    return kernel if isinstance(kernel.scales, CompressedScales) else NF4(kernel.codes, compress(kernel.scales))


def _of_layer(sharding: Sharding, shape: tuple[int, ...], ndim: int) -> Sharding:
    """The sharding of a dense layer, from that of the codes of all layers."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    entries = (*sharding.spec, *(None,) * (ndim - len(sharding.spec)))
    return NamedSharding(sharding.mesh, P(*entries[ndim - len(shape) :]))


def _zeros(leaf: QuantizedArray, shardings: tuple[Sharding, ...]) -> QuantizedArray:
    treedef = jax.tree.structure(leaf)

    def make() -> QuantizedArray:
        return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), leaf)

    return jax.jit(make, out_shardings=jax.tree.unflatten(treedef, shardings))()


@partial(jax.jit, static_argnums=(3, 4, 5), donate_argnums=(0,))
def _store(
    keep: QuantizedArray,
    kernel: jax.Array | QuantizedArray,
    layer: jax.Array,
    change: Callable[[Any], QuantizedArray],
    shardings: tuple[Sharding, ...],
    stacked: bool,
) -> QuantizedArray:
    new = change(kernel)
    if stacked:
        new = jax.tree.map(lambda all_layers, one: all_layers.at[layer].set(one), keep, new)
    arrays = [jax.lax.with_sharding_constraint(x, s) for x, s in zip(jax.tree.leaves(new), shardings, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(new), arrays)
