"""The scales of blocks, compressed to 8 bits: double quantisation (arXiv:2305.14314, section 3)."""

# N blocks of inputs, O outputs, G groups of 256 scales

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp

from jaxft.quant.array import TINY
from jaxft.quant.dynamic import dynamic_map, nearest

GROUP = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompressedScales:
    """codes: uint8 [..., N, O], numbers of the signed dynamic map. largest: float32 [..., G], a magnitude for each 256
    scales, counted through the blocks of one output after those of the other. mean: float32 [...], of all scales.
    """

    codes: jax.Array
    largest: jax.Array
    mean: jax.Array

    def expand(self) -> jax.Array:
        """The scales, float32 [..., N, O]."""
        *stack, count, outputs = self.codes.shape
        # Every group's magnitude spread over its scales by shape alone: no lookup, nothing that travels.
        largest = jnp.broadcast_to(self.largest[..., None], (*self.largest.shape, GROUP)).reshape(*stack, -1)
        largest = jnp.swapaxes(largest[..., : count * outputs].reshape(*stack, outputs, count), -1, -2)
        levels = jnp.take(jnp.asarray(dynamic_map(signed=True)), self.codes.astype(jnp.int32), axis=0)
        return levels * largest + self.mean[..., None, None]

    def map_arrays(self, change: Callable[[jax.Array], jax.Array]) -> Self:
        """See `QuantizedArray.map_arrays`."""
        return CompressedScales(change(self.codes), self.largest, self.mean)


def dense_scales(scales: jax.Array | CompressedScales) -> jax.Array:
    """[..., N, O] float32, whichever way they are stored."""
    return scales.expand() if isinstance(scales, CompressedScales) else scales


def compress(scales: jax.Array, mean: jax.Array | None = None) -> CompressedScales:
    """scales: float32 [..., N, O]. mean: float32 [...], computed where None."""
    *stack, count, outputs = scales.shape
    mean = _mean(scales) if mean is None else mean
    flat = jnp.swapaxes(scales - mean[..., None, None], -1, -2).reshape(*stack, -1)
    groups = math.ceil(count * outputs / GROUP)
    flat = jnp.pad(flat, [(0, 0)] * len(stack) + [(0, groups * GROUP - count * outputs)])
    grouped = flat.reshape(*stack, groups, GROUP)
    largest = jnp.max(jnp.abs(grouped), axis=-1)
    # The scales of a group may all be the mean, as in a matrix of zeros.
    codes = nearest(grouped * (1.0 / jnp.maximum(largest, TINY))[..., None], signed=True)
    codes = jnp.where(largest[..., None] > 0, codes, 0)
    codes = codes.reshape(*stack, -1)[..., : count * outputs].reshape(*stack, outputs, count)
    return CompressedScales(jnp.swapaxes(codes, -1, -2), largest, mean)


def _mean(scales: jax.Array) -> jax.Array:
    # What a first mean leaves is small, so that its mean takes away the rounding of a million sums in float32.
    first = scales.mean(axis=(-2, -1), keepdims=True)
    return (first + (scales - first).mean(axis=(-2, -1), keepdims=True))[..., 0, 0]
