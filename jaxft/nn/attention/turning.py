"""The rotation of queries and keys as a matrix product: vector units of TPUs move halves of their lanes slowly."""

# B batch, S sequence, N heads, H head_dim, F frequencies: half of the rotated dimensions

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def turned(x_BSNH: jax.Array, cos_BSF: jax.Array, sin_BSF: jax.Array, *, pairs: bool) -> jax.Array:
    """x cos + (x M) sin over whole heads, in float32, as `rope.rotate` computes it from halves of heads.

    M has one 1 or -1 in a column, for the other dimension of its pair, so that x M is exact if the products are those
    of x's type: bfloat16 on TPUs. The gradient by x is the rotation back. The angles have none.
    """
    head_dim = x_BSNH.shape[-1]
    cos_BS1H, sin_BS1H = (
        _of_heads(angles_BSF, head_dim, rest, pairs=pairs) for angles_BSF, rest in ((cos_BSF, 1.0), (sin_BSF, 0.0))
    )
    return _turned((2 * cos_BSF.shape[-1], pairs), x_BSNH, cos_BS1H, sin_BS1H)


def _of_heads(angles_BSF: jax.Array, head_dim: int, rest: float, *, pairs: bool) -> jax.Array:
    """Cosines or sines for each dimension of a head, [B, S, 1, H]. rest: for dimensions that are not rotated."""
    both = jnp.repeat(angles_BSF, 2, axis=-1) if pairs else jnp.concatenate([angles_BSF, angles_BSF], axis=-1)
    widths = [(0, 0), (0, 0), (0, head_dim - both.shape[-1])]
    return jnp.pad(both, widths, constant_values=rest)[:, :, None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turned(layout: tuple[int, bool], x_BSNH: jax.Array, cos_BS1H: jax.Array, sin_BS1H: jax.Array) -> jax.Array:
    """layout: the number of rotated dimensions, and whether neighbours are a pair."""
    partners_HH = jnp.asarray(_partners(x_BSNH.shape[-1], *layout), x_BSNH.dtype)
    partner_BSNH = jnp.matmul(x_BSNH, partners_HH, preferred_element_type=jnp.float32)
    return (x_BSNH.astype(jnp.float32) * cos_BS1H + partner_BSNH * sin_BS1H).astype(x_BSNH.dtype)


def _forward(
    layout: tuple[int, bool], x_BSNH: jax.Array, cos_BS1H: jax.Array, sin_BS1H: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _turned(layout, x_BSNH, cos_BS1H, sin_BS1H), (cos_BS1H, sin_BS1H)


def _backward(
    layout: tuple[int, bool], angles: tuple[jax.Array, jax.Array], grad_BSNH: jax.Array
) -> tuple[jax.Array, None, None]:
    cos_BS1H, sin_BS1H = angles
    return _turned(layout, grad_BSNH, cos_BS1H, -sin_BS1H), None, None


_turned.defvjp(_forward, _backward)


def _partners(head_dim: int, rotated: int, pairs: bool) -> np.ndarray:
    """M: x M has -x[second] at the first dimension of each pair and x[first] at the second, and 0 elsewhere."""
    matrix_HH = np.zeros((head_dim, head_dim), np.float32)
    dims = np.arange(rotated)
    first, second = (dims[0::2], dims[1::2]) if pairs else (dims[: rotated // 2], dims[rotated // 2 :])
    matrix_HH[second, first] = -1.0
    matrix_HH[first, second] = 1.0
    return matrix_HH
