"""Normalisation of the last axis: RMSNorm (arXiv:1910.07467), or LayerNorm without bias (arXiv:1607.06450)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import partition
from jaxft.nn.storage import StorageDims


@dataclass(frozen=True, kw_only=True)
class NormShape:
    """Settings that differ between families.

    plus_one: the parameter is the scale minus 1 (Gemma). centered: the mean is subtracted first, as in LayerNorm.
    groups: the parts of the axis that are normalised each by itself. scaled: whether there is a parameter.
    """

    eps: float
    plus_one: bool = False
    centered: bool = False
    groups: int = 1
    scaled: bool = True


class Norm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, computed in float32."""

    def __init__(self, width: int, shape: NormShape, *, dtype: jnp.dtype, param_dtype: jnp.dtype) -> None:
        start = jnp.zeros if shape.plus_one else jnp.ones
        self.scale = nnx.Param(start((width,), param_dtype)) if shape.scaled else None
        self.shape = shape
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if self.shape.centered:
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        parts = x32.reshape(*x.shape[:-1], self.shape.groups, -1) if self.shape.groups > 1 else x32
        parts = parts * jax.lax.rsqrt(jnp.mean(jnp.square(parts), axis=-1, keepdims=True) + self.shape.eps)
        if self.scale is None:
            return parts.reshape(x.shape).astype(self.dtype)
        scale = partition.gather(self.scale.get_value(), ("weight",), (None,)).astype(jnp.float32)
        return (parts.reshape(x.shape) * (1.0 + scale if self.shape.plus_one else scale)).astype(self.dtype)

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"scale": StorageDims(("weight",))}
