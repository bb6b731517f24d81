"""Whole numbers of 8 or 4 bits times a scale: int8 for each output, int4 for each block of inputs."""

# I inputs, O outputs, N blocks of 64 inputs

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp

from jaxft.quant.array import TINY, QuantizedArray, blocks
from jaxft.quant.nibbles import BLOCK, pack, unpack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8(QuantizedArray):
    """codes: int8 [..., I, O]. scales: float32 [..., 1, O], one for all inputs of an output.

    What is meant is code times scale; the largest magnitude of an output has code 127 or -127, as in LLM.int8
    (arXiv:2208.07339, section 3.1).
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., I, O]"""
        return self.codes.shape

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """[..., I, O]: code times scale."""
        return (self.codes.astype(jnp.float32) * self.scales).astype(dtype)

    def map_arrays(self, change: Callable[[jax.Array], jax.Array]) -> Self:
        """See `QuantizedArray.map_arrays`."""
        return Int8(change(self.codes), change(self.scales))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int4(QuantizedArray):
    """codes: uint8 [..., I / 2, O], two numbers from 1 to 15 a byte, as `nibbles` packs them; 8 stands for zero.

    scales: float32 [..., N, O]. What is meant is (code - 8) times the scale of its block; a block's largest magnitude
    has code 15 or 1.
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., I, O]"""
        *stack, half, outputs = self.codes.shape
        return (*stack, 2 * half, outputs)

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """[..., I, O]"""
        codes = unpack(self.codes).astype(jnp.float32) - 8.0
        return (codes * self.scales[..., None, None, :]).astype(dtype).reshape(self.shape)

    def map_arrays(self, change: Callable[[jax.Array], jax.Array]) -> Self:
        """See `QuantizedArray.map_arrays`."""
        return Int4(change(self.codes), change(self.scales))


def int8(kernel: jax.Array) -> Int8:
    """kernel: [..., I, O]."""
    largest = jnp.max(jnp.abs(kernel.astype(jnp.float32)), axis=-2, keepdims=True)
    # By the reciprocal, and half to even, as torch divides and rounds.
    codes = jnp.round(kernel * (127.0 * (1.0 / jnp.maximum(largest, TINY))))
    return Int8(codes.astype(jnp.int8), largest / 127.0)


def int4(kernel: jax.Array) -> Int4:
    """kernel: [..., I, O], I a multiple of 64."""
    x = blocks(kernel, BLOCK)
    largest = jnp.max(jnp.abs(x), axis=-2)
    codes = jnp.round(x * (7.0 / jnp.maximum(largest, TINY))[..., None, :]) + 8.0
    return Int4(pack(codes.astype(jnp.uint8).reshape(kernel.shape)), largest / 7.0)
