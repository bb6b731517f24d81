"""Adam with 8-bit moments: codes in blocks with a scale each (arXiv:2110.02861), 2.03 bytes per parameter instead of 8.

Codes, rounding and arithmetic are those of bitsandbytes' AdamW8bit; the layout of the blocks differs. bitsandbytes cuts
the flat array into runs of 256. Here blocks run along one axis of a matrix, so that codes have the shape and sharding
of their parameter and scales are sharded with them: along the outputs, or along the inputs in the LM head and in layers
whose inputs the tensor axis splits. So no block crosses a side that is sharded, except in adapters, which are small. If
the axis is a multiple of 256, the blocks are the ones that bitsandbytes cuts from the array or its transpose; otherwise
a block is the largest divisor below 256.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.nn.param_kind import kind_of
from jaxft.quant.dynamic import decode, encode

BLOCK = 256
# Layers with fewer parameters keep float32 moments: bitsandbytes' min_8bit_size.
SMALL = 4096
# Scales of shorter blocks would take as much memory as codes: an axis without a larger divisor is one block.
SHORTEST = 32
ALONG_INPUTS = ("o_proj/kernel", "down_proj/kernel", "lm_head/kernel")
SIGNED = {"mu": True, "nu": False}


class EightBitState(NamedTuple):
    """steps: int32, number of updates so far. mu, nu: moments by path, uint8 codes or float32.

    mu_scales, nu_scales: `absmax`, the largest magnitude in each block, by path, for moments in 8 bits.
    """

    steps: jax.Array
    mu: dict[str, jax.Array]
    nu: dict[str, jax.Array]
    mu_scales: dict[str, dict[str, jax.Array]]
    nu_scales: dict[str, dict[str, jax.Array]]


def scale_by_adam_8bit(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction; for dicts from path to array.

    Vectors, matrices with fewer than 4096 elements per layer, and embedding tables keep float32 moments. Most rows of a
    table see no token in a step (section 2.3 of the paper; transformers does the same).
    """

    def init(params: dict[str, jax.Array]) -> EightBitState:
        codes = {p: jnp.zeros(x.shape, jnp.uint8 if uses_8_bits(p, x) else jnp.float32) for p, x in params.items()}
        scales = {
            p: {"absmax": jnp.zeros(_scales_shape(p, x.shape), jnp.float32)}
            for p, x in params.items()
            if uses_8_bits(p, x)
        }
        nu_codes, nu_scales = jax.tree.map(jnp.copy, (codes, scales))
        return EightBitState(jnp.int32(0), codes, nu_codes, scales, nu_scales)

    def update(
        grads: dict[str, jax.Array], state: EightBitState, params: dict[str, jax.Array] | None = None
    ) -> tuple[dict[str, jax.Array], EightBitState]:
        steps = state.steps + 1
        first, second = 1 - b1**steps, jnp.sqrt(1 - b2**steps)
        new = EightBitState(steps, {}, {}, {}, {})
        updates: dict[str, jax.Array] = {}
        for path, grad in grads.items():
            mu = b1 * _moment(state, "mu", path) + (1 - b1) * grad
            nu = b2 * _moment(state, "nu", path) + (1 - b2) * grad * grad
            updates[path] = mu / first / (jnp.sqrt(nu) / second + eps)
            for name, x in (("mu", mu), ("nu", nu)):
                codes, scales = getattr(new, name), getattr(new, f"{name}_scales")
                if uses_8_bits(path, grad):
                    codes[path], absmax = quantize_blocks(x, block_axis(path), signed=SIGNED[name])
                    scales[path] = {"absmax": absmax}
                else:
                    codes[path] = x
        return updates, new

    return optax.GradientTransformation(init, update)


def uses_8_bits(path: str, x: jax.Array) -> bool:
    """Whether the moments of a parameter are stored in 8 bits."""
    kind = kind_of(path, x.ndim)
    return kind.matrix and x.shape[-2] * x.shape[-1] >= SMALL and not kind.embedding


def block_axis(path: str) -> int:
    """The axis along which blocks run, counted from the last."""
    return -2 if path.endswith(ALONG_INPUTS) else -1


def block_length(length: int) -> int:
    """Elements of each block along an axis."""
    longest = next(block for block in range(min(BLOCK, length), 0, -1) if length % block == 0)
    return longest if longest >= SHORTEST else length


def quantize_blocks(x: jax.Array, axis: int, *, signed: bool) -> tuple[jax.Array, jax.Array]:
    """(codes shaped like x, largest magnitude in each block). axis: along which blocks run, counted from the last.

    signed: whether x has both signs.
    """
    blocks = _blocks(x, axis)
    absmax = jnp.max(jnp.abs(blocks), axis=axis, keepdims=True)
    # A block of zeros has the scale 0, so that every code means 0.
    codes = encode(blocks / jnp.where(absmax > 0, absmax, 1.0), signed=signed)
    return codes.reshape(x.shape), jnp.squeeze(absmax, axis)


def dequantize_blocks(codes: jax.Array, absmax: jax.Array, axis: int, *, signed: bool) -> jax.Array:
    """Inverse of `quantize_blocks`, float32."""
    return (decode(_blocks(codes, axis), signed=signed) * jnp.expand_dims(absmax, axis)).reshape(codes.shape)


def _blocks(x: jax.Array, axis: int) -> jax.Array:
    """x with the axis split in two, blocks and their elements; the latter keeps the axis's number from the last."""
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
    return dequantize_blocks(x, scales[path]["absmax"], block_axis(path), signed=SIGNED[name])
