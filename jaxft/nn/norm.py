"""Root mean square normalisation (arXiv:1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, computed in float32."""

    def __init__(self, width: int, *, eps: float, dtype: jnp.dtype, param_dtype: jnp.dtype) -> None:
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * inverse * self.scale.get_value().astype(jnp.float32)).astype(self.dtype)
