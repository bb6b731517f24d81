"""Products of rows, sorted by expert, with the experts' matrices by megablox, the kernels that JAX has for TPUs.

`jax.lax.ragged_dot` does not serve there: libtpu 0.0.42 computes the gradient of the matrices, and libtpu 0.0.52 all
of them, as products of every row with every matrix.
"""

# R rows, E experts, I inputs, O outputs

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from jaxft.nn import partition

LEAST_ROWS, MOST_ROWS = 16, 512  # of a block
# Bytes of a block's inputs and outputs of one row: two blocks of all operands are in vector memory at once.
INPUT_BYTES, OUTPUT_BYTES = 4096, 1024


def block_rows(rows: int, experts: int) -> int:
    """Rows of a block: at most half of an expert's share. A block in which two experts meet is computed twice."""
    size = LEAST_ROWS
    while size < MOST_ROWS and 4 * size * experts <= rows:
        size *= 2
    return size


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """x [R, I] times kernel [E, I, O] -> [R, O]: the first sizes_E[0] rows with matrix 0, the next with matrix 1, ...

    Both have one dtype. Rows beyond the sum of sizes_E become zeros. In interpret mode where there is no TPU.
    """
    return _rows_product(x, kernel, sizes_E, transposed=False)


Operands = tuple[jax.Array, jax.Array, jax.Array]


def _forward(x: jax.Array, kernel: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, Operands]:
    return product(x, kernel, sizes_E), (x, kernel, sizes_E)


def _backward(operands: Operands, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, kernel, sizes_E = operands
    grad_x = _rows_product(grad, kernel, sizes_E, transposed=True)
    size = block_rows(len(x), len(sizes_E))
    inputs = min(kernel.shape[1], INPUT_BYTES // 2 // kernel.dtype.itemsize)
    outputs = min(kernel.shape[2], OUTPUT_BYTES // kernel.dtype.itemsize)
    grad_kernel = tgmm(
        _padded(x, size).T, _padded(grad, size), sizes_E, kernel.dtype, (size, inputs, outputs), interpret=_interpret()
    )
    return grad_x, grad_kernel, None


product.defvjp(_forward, _backward)


def _rows_product(x: jax.Array, kernel: jax.Array, sizes_E: jax.Array, *, transposed: bool) -> jax.Array:
    """transposed: the matrices are [O, I]."""
    size, (inputs, outputs) = block_rows(len(x), len(sizes_E)), kernel.shape[:0:-1] if transposed else kernel.shape[1:]
    tiling = size, min(inputs, INPUT_BYTES // x.dtype.itemsize), min(outputs, OUTPUT_BYTES // x.dtype.itemsize)
    y = gmm(_padded(x, size), kernel, sizes_E, x.dtype, tiling, transpose_rhs=transposed, interpret=_interpret())
    # No block is computed for later rows, whose memory holds anything.
    return jnp.where((jnp.arange(len(x)) < jnp.sum(sizes_E))[:, None], y[: len(x)], 0)


def _padded(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x, ((0, -len(x) % size), (0, 0)))


def _interpret() -> bool:
    return partition.platform() != "tpu"
