"""Adam whose moments are 8-bit codes in blocks with a scale each (arXiv:2110.02861): 2.03 bytes a parameter, not 8.

Codes, rounding and arithmetic are those of bitsandbytes' AdamW8bit. What differs is how blocks lie. bitsandbytes cuts
the flat array into runs of 256; here blocks go along one axis of a matrix, so that codes are shaped and split like
their parameter and scales are split with them: along the outputs, or, in layers whose inputs the tensor axis splits and
in the LM head, along the inputs. No block then lies across the side that many devices share, but for adapters, which
are small. Where the axis is a multiple of 256, bitsandbytes cuts the same array, or its transpose, alike; elsewhere a
block is the largest divisor below 256.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.optim.parameters import kind_of
from jaxft.quant.dynamic import decode, encode

BLOCK = 256
# Parameters of one layer below which moments stay in float32, bitsandbytes' min_8bit_size.
SMALL = 4096
# Shorter than this, scales would weigh as much as codes: an axis without such a divisor is one block.
SHORTEST = 32
ALONG_INPUTS = ("o_proj/kernel", "down_proj/kernel", "lm_head/kernel")
SIGNED = {"mu": True, "nu": False}


class EightBitState(NamedTuple):
    """count: int32, updates made. mu, nu: moments by path, uint8 codes, or float32 where small.

    mu_scales, nu_scales: `absmax`, the largest size in each block, by path, for those in 8 bits.
    """

    count: jax.Array
    mu: dict[str, jax.Array]
    nu: dict[str, jax.Array]
    mu_scales: dict[str, dict[str, jax.Array]]
    nu_scales: dict[str, dict[str, jax.Array]]


def scale_by_adam_8bit(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction; on dicts from path to array.

    In float32 stay vectors, what has fewer than 4096 elements in a layer, and embedding tables, most of whose rows
    see no token in a step (section 2.3 of the paper; transformers keeps them so too).
    """

    def init(params: dict[str, jax.Array]) -> EightBitState:
        codes = {p: jnp.zeros(x.shape, jnp.uint8 if in_8_bits(p, x) else jnp.float32) for p, x in params.items()}
        scales = {
            p: {"absmax": jnp.zeros(_scales_shape(p, x.shape), jnp.float32)}
            for p, x in params.items()
            if in_8_bits(p, x)
        }
        again = jax.tree.map(jnp.copy, (codes, scales))
        return EightBitState(jnp.int32(0), codes, again[0], scales, again[1])

    def update(
        grads: dict[str, jax.Array], state: EightBitState, params: Any = None
    ) -> tuple[dict[str, jax.Array], EightBitState]:
        count = state.count + 1
        first, second = 1 - b1**count, jnp.sqrt(1 - b2**count)
        new = EightBitState(count, {}, {}, {}, {})
        updates = {}
        for path, grad in grads.items():
            mu = b1 * _moment(state, "mu", path) + (1 - b1) * grad
            nu = b2 * _moment(state, "nu", path) + (1 - b2) * grad * grad
            updates[path] = mu / first / (jnp.sqrt(nu) / second + eps)
            for name, x in (("mu", mu), ("nu", nu)):
                codes, scales = getattr(new, name), getattr(new, f"{name}_scales")
                if in_8_bits(path, grad):
                    codes[path], absmax = quantized(x, block_axis(path), signed=SIGNED[name])
                    scales[path] = {"absmax": absmax}
                else:
                    codes[path] = x
        return updates, new

    return optax.GradientTransformation(init, update)


def in_8_bits(path: str, x: Any) -> bool:
    """Whether the moments of a parameter are kept in 8 bits."""
    kind = kind_of(path, x.ndim)
    return kind.matrix and x.shape[-2] * x.shape[-1] >= SMALL and not path.endswith("embedding")


def block_axis(path: str) -> int:
    """The axis, counted from the last, that blocks go along."""
    return -2 if path.endswith(ALONG_INPUTS) else -1


def block_length(length: int) -> int:
    """Elements of each block along an axis."""
    longest = next(block for block in range(min(BLOCK, length), 0, -1) if length % block == 0)
    return longest if longest >= SHORTEST else length


def quantized(x: jax.Array, axis: int, *, signed: bool) -> tuple[jax.Array, jax.Array]:
    """(codes shaped like x, largest size in each block of an axis counted from the last)."""
    blocks = _blocks(x, axis)
    absmax = jnp.max(jnp.abs(blocks), axis=axis, keepdims=True)
    # A block of zeros has no scale: any code stands for 0 there.
    codes = encode(blocks / jnp.where(absmax > 0, absmax, 1.0), signed=signed)
    return codes.reshape(x.shape), jnp.squeeze(absmax, axis)


def dequantized(codes: jax.Array, absmax: jax.Array, axis: int, *, signed: bool) -> jax.Array:
    """Inverse of `quantized`, float32."""
    return (decode(_blocks(codes, axis), signed=signed) * jnp.expand_dims(absmax, axis)).reshape(codes.shape)


def _blocks(x: jax.Array, axis: int) -> jax.Array:
    """x with the axis cut in two, blocks and what is in them; the latter has the axis's number from the last."""
    at = x.ndim + axis
    block = block_length(x.shape[at])
    return x.reshape(*x.shape[:at], x.shape[at] // block, block, *x.shape[at + 1 :])


def _scales_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    at = len(shape) + block_axis(path)
    return (*shape[:at], shape[at] // block_length(shape[at]), *shape[at + 1 :])


def _moment(state: EightBitState, name: str, path: str) -> jax.Array:
    x, scales = getattr(state, name)[path], getattr(state, f"{name}_scales")
    if path not in scales:
        return x
    return dequantized(x, scales[path]["absmax"], block_axis(path), signed=SIGNED[name])
