"""8- and 4-bit integers times a scale: int8 with a scale for each output, int4 with one for each block of inputs."""

# I inputs, O outputs, N blocks of 64 inputs

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.quant.array import TINY, QuantizedArray, ScaledCodes, blocks
from jaxft.quant.nibbles import BLOCK, pack, unpack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8(ScaledCodes):
    """Codes in int8. The largest magnitude of an output has code 127 or -127, as in LLM.int8 (arXiv:2208.07339, section
    3.1).
    """


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int4(QuantizedArray):
    """codes: uint8 [..., I / 2, O], two codes from 1 to 15 in a byte, packed by `nibbles`; code 8 is zero.

    scales: float32 [..., N, O]. A weight is (code - 8) times the scale of its block; a block's largest magnitude has
    code 15 or 1.
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, half, outputs = self.codes.shape
        return (*stack, 2 * half, outputs)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        codes = unpack(self.codes).astype(jnp.float32) - 8.0
        return (codes * self.scales[..., None, None, :]).astype(dtype).reshape(self.shape)

    def map_arrays(self, change: Callable[[jax.Array], jax.Array]) -> Self:
        return dataclasses.replace(self, codes=change(self.codes), scales=change(self.scales))


def int8(kernel: jax.Array) -> Int8:
    """Quantises a kernel [..., I, O]."""
    largest = jnp.max(jnp.abs(kernel.astype(jnp.float32)), axis=-2, keepdims=True)
    # Multiplied by the reciprocal, and rounded half to even, as torch does.
    codes = jnp.round(kernel * (127.0 * (1.0 / jnp.maximum(largest, TINY))))
    return Int8(codes.astype(jnp.int8), largest / 127.0)


def int4(kernel: jax.Array) -> Int4:
    """Quantises a kernel [..., I, O]; I is a multiple of 64."""
    x = blocks(kernel, BLOCK)
    largest = jnp.max(jnp.abs(x), axis=-2)
    codes = jnp.round(x * (7.0 / jnp.maximum(largest, TINY))[..., None, :]) + 8.0
    return Int4(pack(codes.astype(jnp.uint8).reshape(kernel.shape)), largest / 7.0)
