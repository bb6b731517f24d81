"""Products of 8-bit operands: rows and kernels are rounded to int8 or fp8 for one product, with a scale for each row.

int8 adds up exactly, in int32. fp8 is e4m3 forward and e5m2 for gradients, which need range more than precision
(arXiv:2209.05433), and adds up in float32. Scales are those of the largest magnitude, taken anew for every product.
"""

# M rows, I inputs, O outputs

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.quant.array import TINY, ScaledCodes
from jaxft.quant.integer import Int8

MatmulDtype = Literal["int8", "fp8"]
# The types of operands forward, and of gradients.
FORWARD: dict[MatmulDtype, DTypeLike] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
BACKWARD: dict[MatmulDtype, DTypeLike] = {"int8": jnp.int8, "fp8": jnp.float8_e5m2}

SCOPE = "narrow_codes"  # of the multiplication before rounding in compiled programs: one for each number
# The fewest rows of a device for such products. Rounding a kernel reads and writes about four bytes a weight, in which
# time an H100 saves nothing with products of fewer rows. TPUs round more slowly: docs/quantization.md has their cycles.
FEWEST_ROWS = 1024


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Narrow(ScaledCodes):
    """A kernel as the operand of a product: codes in int8 or fp8 [I, O], scales [1, O]."""


def narrow_kernel(kernel: jax.Array, name: MatmulDtype) -> Narrow:
    """A kernel [I, O] with a scale for each output."""
    return Narrow(*_rounded(kernel, FORWARD[name], axis=-2))


def as_operand(kernel: Int8) -> Narrow:
    """A kernel that is stored in int8, whose codes and scales are those of an operand."""
    return Narrow(kernel.codes, kernel.scales)


def multiply(x: jax.Array, kernel: Narrow, name: MatmulDtype) -> jax.Array:
    """x [..., I] @ kernel [I, O] -> [..., O] in the dtype of x, whose rows are rounded."""
    codes, scales = _rounded(x, FORWARD[name], axis=-1)
    return (_sums(codes, kernel.codes, 0, x.dtype) * scales * kernel.scales[0]).astype(x.dtype)


def multiply_transposed(grad: jax.Array, kernel: Narrow, name: MatmulDtype) -> jax.Array:
    """grad [..., O] @ kernel^T -> [..., I] in the dtype of grad.

    The scales of the kernel, which differ along the sum, go into grad before its rows are rounded.
    """
    codes, scales = _rounded(grad.astype(jnp.float32) * kernel.scales[0], BACKWARD[name], axis=-1)
    return (_sums(codes, kernel.codes, 1, grad.dtype) * scales).astype(grad.dtype)


def _rounded(x: jax.Array, dtype: DTypeLike, axis: int) -> tuple[jax.Array, jax.Array]:
    """(codes, scales): x is about codes times scales, which are alike along an axis; the largest code is dtype's."""
    is_int = jnp.issubdtype(dtype, jnp.integer)
    most = float(jnp.iinfo(dtype).max if is_int else jnp.finfo(dtype).max)
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
    with jax.named_scope(SCOPE):
        scaled = wide * (most / jnp.maximum(largest, TINY * most))
    return (jnp.round(scaled) if is_int else scaled).astype(dtype), largest / most


def _sums(left: jax.Array, right: jax.Array, axis: int, dtype: DTypeLike) -> jax.Array:
    """The sums of products along the last axis of left and an axis of right, rounded to `dtype`, as float32.

    A GPU's product ends with that rounding, and the scales come after it: so it writes two bytes a number, not four.
    """
    exact = jnp.int32 if jnp.issubdtype(left.dtype, jnp.integer) else jnp.float32
    sides = (((left.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(left, right, sides, preferred_element_type=exact).astype(dtype).astype(jnp.float32)
