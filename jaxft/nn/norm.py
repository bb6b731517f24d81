"""Root mean square normalisation, RMSNorm (arXiv:1910.07467)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import partition
from jaxft.nn.storage import StorageDims


@dataclass(frozen=True, kw_only=True)
class NormShape:
    """Settings that differ between families. plus_one: the parameter is the scale minus 1 (Gemma)."""

    eps: float
    plus_one: bool = False


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, computed in float32."""

    def __init__(self, width: int, shape: NormShape, *, dtype: jnp.dtype, param_dtype: jnp.dtype) -> None:
        start = jnp.zeros if shape.plus_one else jnp.ones
        self.scale = nnx.Param(start((width,), param_dtype))
        self.shape = shape
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        scale = partition.gather(self.scale.get_value(), ("weight",), (None,)).astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.shape.eps)
        return (x32 * inverse * (1.0 + scale if self.shape.plus_one else scale)).astype(self.dtype)

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"scale": StorageDims(("weight",))}
