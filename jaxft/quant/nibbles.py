"""Packs two 4-bit codes into a byte."""

# I inputs, O outputs, N blocks of 64 inputs

import jax
import jax.numpy as jnp

BLOCK = 64  # consecutive inputs that are packed as a group


def pack(codes: jax.Array) -> jax.Array:
    """uint8 below 16, [..., I, O], I a multiple of 64 -> uint8 [..., I / 2, O].

    Of each 64 inputs, the first 32 are in the low halves and the others in the high halves, so that unpacking moves
    whole rows. uint8 and not uint4, because a CPU would store each uint4 in a whole byte.
    """
    *stack, inputs, outputs = codes.shape
    low, high = jnp.split(codes.reshape(*stack, inputs // BLOCK, BLOCK, outputs), 2, axis=-2)
    return (low | high << 4).reshape(*stack, inputs // 2, outputs)


def unpack(packed: jax.Array) -> jax.Array:
    """The inverse of `pack` except for the shape: uint8 [..., N, 2, 32, O], with N * 2 * 32 = I."""
    *stack, half, outputs = packed.shape
    blocks = packed.reshape(*stack, half * 2 // BLOCK, 1, BLOCK // 2, outputs)
    return blocks >> jnp.array([0, 4], jnp.uint8)[:, None, None] & 15
