"""A Pallas kernel for products with NF4 weights on TPUs: tiles are dequantised in vector memory, never in main memory.

The arithmetic is that of XLA's form, `NF4.dense` and a product, with sums over tiles in float32. The kernel works on
arrays of one device; on a mesh, call it in `jax.shard_map`.
"""

# M rows, I inputs, O outputs, N blocks of 64 inputs

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxft.quant.nf4 import LEVELS, NF4, select
from jaxft.quant.nibbles import BLOCK
from jaxft.quant.scales import dense_scales

LANES = 128
# A tile of weights is 512 inputs, whose 8 scales per output fill a register, by at most 512 outputs. It is dequantised
# once for each block of rows, so blocks of few rows would spend more time on that than on the product.
INPUTS, OUTPUTS = 512, 512
FEWEST_ROWS, MOST_ROWS = 1024, 4096
# Bytes of vector memory for the blocks of a product. libtpu gives a kernel 16 MiB; the tile of weights needs the rest.
BLOCK_BYTES = 13 * 2**20
NAME = "nf4_matmul"  # in compiled programs, followed by the number of rows in a block


def block_rows(rows: int, kernel: NF4, itemsize: int) -> int | None:
    """The rows in a block of a product of this many rows with the kernel; None if it does not divide into whole tiles.

    itemsize: bytes of a number of the rows. The block is the largest that divides the rows and fits the memory.
    """
    inputs, outputs = kernel.shape[-2:]
    if kernel.ndim != 2 or inputs % INPUTS or outputs % LANES:
        return None
    # A block of the operand and one of the result, each twice to overlap with copies, and the float32 sum.
    most = min(MOST_ROWS, BLOCK_BYTES // (INPUTS * (4 * itemsize + 4)))
    return next((size for size in range(most - most % LANES, FEWEST_ROWS - 1, -LANES) if rows % size == 0), None)


def matmul(x: jax.Array, kernel: NF4, *, transposed: bool = False, interpret: bool = False) -> jax.Array:
    """x [..., I] @ kernel [I, O] -> [..., O] in x's dtype; transposed: x [..., O] @ kernel^T -> [..., I].

    interpret: run without a TPU. Sizes must be such that `block_rows` gives a number. There is no gradient.
    Raises ValueError otherwise.
    """
    x_MX = x.reshape(-1, x.shape[-1])
    rows, inputs, outputs = block_rows(len(x_MX), kernel, x.dtype.itemsize), INPUTS, _block(OUTPUTS, kernel.shape[1])
    if rows is None:
        raise ValueError(
            f"{len(x_MX)} rows and a kernel {kernel.shape} do not divide into whole tiles: multiply with dense(kernel)"
        )
    summed, produced = (outputs, inputs) if transposed else (inputs, outputs)
    width = kernel.shape[0 if transposed else 1]

    def weight_tile(m: int, produced: int, summed: int) -> tuple[int, int]:
        return (produced, summed) if transposed else (summed, produced)

    y_MY = pl.pallas_call(
        partial(_tile, transposed=transposed),
        # The axis that is summed over comes last.
        grid=(len(x_MX) // rows, width // produced, x_MX.shape[1] // summed),
        in_specs=[
            pl.BlockSpec((rows, summed), lambda m, produced, summed: (m, summed)),
            pl.BlockSpec((inputs // 2, outputs), weight_tile),
            pl.BlockSpec((inputs // BLOCK, outputs), weight_tile),
        ],
        out_specs=pl.BlockSpec((rows, produced), lambda m, produced, summed: (m, produced)),
        out_shape=jax.ShapeDtypeStruct((len(x_MX), width), x.dtype),
        scratch_shapes=[pltpu.VMEM((rows, produced), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=f"{NAME}_{rows}",
    )(x_MX, kernel.codes, dense_scales(kernel.scales))
    return y_MY.reshape(*x.shape[:-1], -1)


def _tile(x_ref: Any, codes_ref: Any, scales_ref: Any, y_ref: Any, sum_ref: Any, *, transposed: bool) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    # Int32 and float32 between loading and the product: not every TPU has narrower arithmetic.
    half, outputs = codes_ref.shape
    packed = codes_ref[...].astype(jnp.int32).reshape(-1, BLOCK // 2, outputs)
    levels = [jnp.float32(level) for level in LEVELS]
    values = jnp.concatenate([select(packed & 15, levels), select(packed >> 4, levels)], axis=1)
    weights = (values * scales_ref[...][:, None, :]).reshape(2 * half, outputs).astype(x_ref.dtype)
    sides = (((1,), (1 if transposed else 0,)), ((), ()))
    exact = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    sum_ref[...] += jax.lax.dot_general(x_ref[...], weights, sides, precision=exact, preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _block(most: int, length: int) -> int:
    """The largest multiple of LANES that divides length and is at most `most`."""
    return max(size for size in range(LANES, min(most, length) + 1, LANES) if length % size == 0)
