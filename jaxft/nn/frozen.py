"""Products with frozen, quantised weights, dequantised for each product and not kept for the backward pass."""

# I inputs, O outputs

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxft.quant import QuantizedArray

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
