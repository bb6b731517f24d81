"""Products with weights that do not move and are not kept as the product needs them."""

# I inputs, O outputs

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.quant import QuantizedArray

# (x [..., I], dense kernel [..., I, O], *indices) -> [..., O], of which the transposed kernel is the transpose in x.
Product = Callable[..., jax.Array]
Lay = Callable[[QuantizedArray], QuantizedArray]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def frozen_product(product: Product, lay: Lay, x: jax.Array, kernel: QuantizedArray, *indices: jax.Array) -> jax.Array:
    """`product(x, kernel, *indices)` of the kernel, brought to where it is used by `lay` and then made dense.

    Between the passes only the codes are kept, where JAX would keep the dense kernel of every layer; the backward pass
    makes it once more. The kernel gets no gradient, and neither do the indices.
    """
    return product(*_ready(lay, x, kernel), *indices)


def _ready(lay: Lay, x: jax.Array, kernel: QuantizedArray) -> tuple[jax.Array, jax.Array]:
    # The kernel is made dense when x is there, not as early as it could be: else those of a layer pile up.
    x, laid = jax.lax.optimization_barrier((x, lay(kernel)))
    return x, laid.dense(x.dtype)


def _forward(
    product: Product, lay: Lay, x: jax.Array, kernel: QuantizedArray, *indices: jax.Array
) -> tuple[jax.Array, Any]:
    return product(*_ready(lay, x, kernel), *indices), (kernel, indices)


def _backward(product: Product, lay: Lay, residuals: Any, grad: jax.Array) -> tuple[Any, ...]:
    kernel, indices = residuals
    grad, dense = _ready(lay, grad, kernel)
    return product(grad, jnp.swapaxes(dense, -1, -2), *indices), None, *(None for _ in indices)


frozen_product.defvjp(_forward, _backward)
