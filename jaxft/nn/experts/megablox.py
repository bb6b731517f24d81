"""Products of rows, sorted by expert, with the experts' matrices by megablox, the kernels that JAX has for TPUs.

`jax.lax.ragged_dot` does not serve there: libtpu 0.0.42 computes the gradient of the matrices, and libtpu 0.0.52 all
of them, as products of every row with every matrix.
"""

# R rows, E experts, I inputs, O outputs, L layers of a stack

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from jaxft.nn import partition

LEAST_ROWS, MOST_ROWS = 16, 512  # of a block
# Bytes of a block's inputs and outputs of one row: two blocks of all operands are in vector memory at once.
INPUT_BYTES, OUTPUT_BYTES = 4096, 1536
LANES = 128  # columns of a tile of a TPU's memory
IN_STACK = "one_layer_of_"  # how `jaxft.plan` finds products that read the matrices of one of so many layers


def block_rows(rows: int, experts: int) -> int:
    """Rows of a block: at most half of an expert's share. A block in which two experts meet is computed twice."""
    size = LEAST_ROWS
    while size < MOST_ROWS and 4 * size * experts <= rows:
        size *= 2
    return size


def block_inputs(inputs: int, most: int) -> int:
    """Inputs of a block: the fewest blocks, of nearly one size. What a block has beyond the last is computed too."""
    count = -(-inputs // most)
    return inputs if count == 1 else -(-inputs // (count * LANES)) * LANES


def block_outputs(outputs: int, most: int) -> int:
    """Outputs of a block: few blocks, each of which reads its rows again, and few outputs beyond the last."""
    if outputs <= most:
        return outputs
    # Reading the rows counts as much as computing LANES outputs: most of it is hidden behind products.
    return min(range(LANES, most + 1, LANES), key=lambda block: -(-outputs // block) * (block + LANES))


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
    return _rows_product(grad, kernel, sizes_E, transposed=True), _kernel_gradient(x, grad, sizes_E), None


product.defvjp(_forward, _backward)


class Stack(NamedTuple):
    """The matrices of all layers of a stack, [L, E, I, O], and the index of the layer that is meant, int32."""

    kernels: jax.Array
    layer: jax.Array


@jax.custom_vjp
def product_in_stack(x: jax.Array, kernel: jax.Array, stack: Stack, sizes_E: jax.Array) -> jax.Array:
    """`product` of one layer, whose matrices are read where they are in the stack.

    A kernel of Pallas needs its operands whole, so that those of a layer would be copied out of the stack first.
    kernel: the layer's own matrices, which get the gradient and are not read; the stack gets none.
    """
    return _rows_product(x, stack, sizes_E, transposed=False)


StackOperands = tuple[jax.Array, Stack, jax.Array]


def _stack_forward(
    x: jax.Array, kernel: jax.Array, stack: Stack, sizes_E: jax.Array
) -> tuple[jax.Array, StackOperands]:
    return product_in_stack(x, kernel, stack, sizes_E), (x, stack, sizes_E)


def _stack_backward(operands: StackOperands, grad: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    x, stack, sizes_E = operands
    return _rows_product(grad, stack, sizes_E, transposed=True), _kernel_gradient(x, grad, sizes_E), None, None


product_in_stack.defvjp(_stack_forward, _stack_backward)


def _rows_product(x: jax.Array, kernel: jax.Array | Stack, sizes_E: jax.Array, *, transposed: bool) -> jax.Array:
    """transposed: the matrices are [O, I]."""
    layers, first = 1, None
    if isinstance(kernel, Stack):
        # Matrix 0 of the layer is that with the number of the offset, with another sign.
        layers, first = len(kernel.kernels), -kernel.layer * len(sizes_E)
        kernel = kernel.kernels.reshape(-1, *kernel.kernels.shape[2:])
    size, (inputs, outputs) = block_rows(len(x), len(sizes_E)), kernel.shape[:0:-1] if transposed else kernel.shape[1:]
    inputs = block_inputs(inputs, INPUT_BYTES // x.dtype.itemsize)
    tiling = size, inputs, block_outputs(outputs, OUTPUT_BYTES // x.dtype.itemsize)
    options = {"transpose_rhs": transposed, "interpret": _interpret()}
    with jax.named_scope(f"{IN_STACK}{layers}"):
        y = gmm(_padded(x, size), kernel, sizes_E, x.dtype, tiling, first, **options)
    # No block is computed for later rows, whose memory holds anything.
    return jnp.where((jnp.arange(len(x)) < jnp.sum(sizes_E))[:, None], y[: len(x)], 0)


def _kernel_gradient(x: jax.Array, grad: jax.Array, sizes_E: jax.Array) -> jax.Array:
    size = block_rows(len(x), len(sizes_E))
    inputs = block_inputs(x.shape[1], INPUT_BYTES // 2 // x.dtype.itemsize)
    outputs = block_outputs(grad.shape[1], OUTPUT_BYTES // x.dtype.itemsize)
    tiling = size, inputs, outputs
    return tgmm(_padded(x, size).T, _padded(grad, size), sizes_E, x.dtype, tiling, interpret=_interpret())


def _padded(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x, ((0, -len(x) % size), (0, 0)))


def _interpret() -> bool:
    return partition.platform() != "tpu"
