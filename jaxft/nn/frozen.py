"""Products with weights in fewer bits than those of computation, which are not kept for the backward pass.

They are frozen and quantised, and dequantised for each product; or any weights, rounded to 8 bits for one.
"""

# I inputs, O outputs

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import PartitionSpec as P

from jaxft.nn import partition
from jaxft.nn.partition import Dimensions
from jaxft.quant import QuantizedArray, narrow, nf4_matmul
from jaxft.quant.integer import Int8
from jaxft.quant.narrow import MatmulDtype, Narrow
from jaxft.quant.nf4 import NF4

# (x [..., I], dense kernel [..., I, O], *indices) -> [..., O]. Linear in x; its transpose is the same product with the
# transposed kernel.
Product = Callable[..., jax.Array]
Layout = Callable[[QuantizedArray], QuantizedArray]
Residuals = tuple[QuantizedArray, tuple[jax.Array, ...]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def frozen_product(
    product: Product, layout: Layout, x: jax.Array, kernel: QuantizedArray, *indices: jax.Array
) -> jax.Array:
    """`product(x, kernel, *indices)`, of the kernel after `layout` has brought it to the devices and dequantised it.

    layout: changes the kernel's layout over devices. Only the codes are kept for the backward pass, which dequantises
    them again; plain JAX would keep the dense kernel of every layer. Neither the kernel nor the indices get a gradient.
    """
    return product(*_operands(layout, x, kernel), *indices)


def _operands(layout: Layout, x: jax.Array, kernel: QuantizedArray) -> tuple[jax.Array, jax.Array]:
    # The barrier delays dequantisation until x is computed. Without it all dense kernels of a layer exist at once.
    x, kernel = jax.lax.optimization_barrier((x, layout(kernel)))
    return x, kernel.dense(x.dtype)


def _forward(
    product: Product, layout: Layout, x: jax.Array, kernel: QuantizedArray, *indices: jax.Array
) -> tuple[jax.Array, Residuals]:
    return product(*_operands(layout, x, kernel), *indices), (kernel, indices)


def _backward(product: Product, layout: Layout, residuals: Residuals, grad: jax.Array) -> tuple[jax.Array | None, ...]:
    kernel, indices = residuals
    grad, dense = _operands(layout, grad, kernel)
    return product(grad, jnp.swapaxes(dense, -1, -2), *indices), None, *(None for _ in indices)


frozen_product.defvjp(_forward, _backward)


ROWS: Dimensions = ("batch", "sequence", None)
# The fewest rows in a block with which the kernel for NF4 is faster than dense weights in main memory, by kind of TPU:
# docs/quantization.md has the cycles. Other kinds keep the dense form.
FEWEST_ROWS = (("TPU v5", 1024), ("TPU v6", 2048))


def suits_tiles(x: jax.Array, kernel: QuantizedArray) -> bool:
    """Whether `tiled_product` computes x @ kernel, and its gradient, in less time than `frozen_product` does."""
    if not isinstance(kernel, NF4) or x.dtype != jnp.bfloat16 or partition.platform() != "tpu":
        return False
    if not partition.is_unsharded() and (x.ndim != 3 or not _rows_are_whole(x)):
        return False
    kind = partition.device_kind()
    fewest = next((rows for name, rows in FEWEST_ROWS if kind.startswith(name)), None)
    rows = x.size // x.shape[-1]
    if not partition.is_unsharded():
        rows //= partition.shards("batch") * partition.shards("sequence")
    block = nf4_matmul.block_rows(rows, kernel, x.dtype.itemsize)
    return fewest is not None and block is not None and block >= fewest


def _rows_are_whole(x_BSI: jax.Array) -> bool:
    """Whether every device has all inputs and outputs of its rows, and as many rows as any other."""
    batch, length, _ = x_BSI.shape
    even = batch % partition.shards("batch") == 0 and length % partition.shards("sequence") == 0
    return even and partition.shards("tensor") == 1


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def tiled_product(layout: Layout, x: jax.Array, kernel: NF4, interpret: bool = False) -> jax.Array:
    """x [..., I] @ kernel [I, O], whose tiles are dequantised in vector memory (`nf4_matmul`), never in main memory.

    layout: brings the codes to every device, as in `frozen_product`. Only the codes are kept for the backward pass. The
    kernel gets no gradient. interpret: run without a TPU.
    """
    return _tiled(layout, x, kernel, transposed=False, interpret=interpret)


def _tiled(layout: Layout, x: jax.Array, kernel: NF4, *, transposed: bool, interpret: bool) -> jax.Array:
    multiply = partial(nf4_matmul.matmul, transposed=transposed, interpret=interpret)
    # The barrier delays the transfer of codes until x is computed.
    x, whole = jax.lax.optimization_barrier((x, layout(kernel)))
    if partition.is_unsharded():
        return multiply(x, whole)
    rows = partition.spec(x.shape, ROWS)
    return jax.shard_map(multiply, in_specs=(rows, P()), out_specs=rows, check_vma=False)(x, whole)


def _tiled_forward(layout: Layout, x: jax.Array, kernel: NF4, interpret: bool) -> tuple[jax.Array, NF4]:
    return tiled_product(layout, x, kernel, interpret), kernel


def _tiled_backward(layout: Layout, interpret: bool, kernel: NF4, grad: jax.Array) -> tuple[jax.Array, None]:
    return _tiled(layout, grad, kernel, transposed=True, interpret=interpret), None


tiled_product.defvjp(_tiled_forward, _tiled_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def narrow_product(
    plain: Product, layout: Layout, name: MatmulDtype, x: jax.Array, kernel: jax.Array | QuantizedArray
) -> jax.Array:
    """x [..., I] @ kernel [I, O] in the dtype of x, of operands in 8 bits, as is the gradient of x (`quant.narrow`).

    plain: the same product in the dtype of x, whose gradient of the kernel is taken as it is; a quantised kernel gets
    none. layout: as in `frozen_product`; of a dense kernel it gets the codes.
    """
    x, operand = _narrow_operands(layout, name, x, kernel)
    return narrow.multiply(x, operand, name)


def _narrow_operands(
    layout: Layout, name: MatmulDtype, x: jax.Array, kernel: jax.Array | QuantizedArray
) -> tuple[jax.Array, Narrow]:
    # No barrier for x, so that layers with the same x round it once.
    if isinstance(kernel, Int8) and name == "int8":
        operand = layout(narrow.as_operand(kernel))
    elif isinstance(kernel, QuantizedArray):
        x, dense = _operands(layout, x, kernel)
        operand = narrow.narrow_kernel(dense, name)
    else:
        operand = layout(narrow.narrow_kernel(kernel, name))
    return x, cast(Narrow, operand)  # a layout keeps the class


def _narrow_forward(
    plain: Product, layout: Layout, name: MatmulDtype, x: CustomVJPPrimal, kernel: Any
) -> tuple[jax.Array, tuple[jax.Array | None, Any]]:
    leaves, tree = jax.tree.flatten(kernel, is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal))
    values = jax.tree.unflatten(tree, [leaf.value for leaf in leaves])
    # The rows are kept only for the gradient of the kernel.
    kept = x.value if any(leaf.perturbed for leaf in leaves) else None
    return narrow_product(plain, layout, name, x.value, values), (kept, values)


def _narrow_backward(
    plain: Product,
    layout: Layout,
    name: MatmulDtype,
    residuals: tuple[jax.Array | None, jax.Array | QuantizedArray],
    grad: jax.Array | SymbolicZero,
) -> tuple[jax.Array, Any]:
    x, kernel = residuals
    grad = jnp.zeros(grad.shape, grad.dtype) if isinstance(grad, SymbolicZero) else grad
    grad_kernel = None if x is None else jax.vjp(partial(plain, x), kernel)[1](grad)[0]
    grad, operand = _narrow_operands(layout, name, grad, kernel)
    return narrow.multiply_transposed(grad, operand, name), grad_kernel


narrow_product.defvjp(_narrow_forward, _narrow_backward, symbolic_zeros=True)
