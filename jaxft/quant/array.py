"""A quantised weight as one value, which replaces a kernel and is dequantised when a layer needs the kernel."""

# I inputs, O outputs

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Smaller than any meaningful scale: the smallest float32 that no device flushes to zero.
TINY = float(jnp.finfo(jnp.float32).tiny)


class QuantizedArray(ABC):
    """A pytree of arrays that represents one array [..., I, O].

    The leading axes are stacks, of layers and of experts; every array inside has them too, so that a scan over layers
    takes one layer's part of each.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the represented array."""

    @abstractmethod
    def dense(self, dtype: DTypeLike) -> jax.Array:
        """The represented array, dequantised in float32 and rounded to `dtype` once."""

    @abstractmethod
    def map_arrays(self, change: Callable[[jax.Array], jax.Array]) -> Self:
        """A copy with `change` applied to every array inside that has the axes I and O, whatever their lengths."""

    @property
    def ndim(self) -> int:
        """Number of dimensions of the represented array."""
        return len(self.shape)

    def __getitem__(self, index: tuple[int, ...] | int) -> Self:
        """The part at an index on the leading axes."""
        return jax.tree.map(lambda part: part[index], self)


@dataclass(frozen=True)
class ScaledCodes(QuantizedArray):
    """Codes times scales. codes: 8-bit numbers [..., I, O]. scales: float32 [..., 1, O], one for all inputs of an
    output.
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def dense(self, dtype: DTypeLike) -> jax.Array:
        return (self.codes.astype(jnp.float32) * self.scales).astype(dtype)

    def map_arrays(self, change: Callable[[jax.Array], jax.Array]) -> Self:
        return replace(self, codes=change(self.codes), scales=change(self.scales))


@dataclass(frozen=True, kw_only=True)
class Format:
    """A quantised format. name: for users. quantize: quantises an array [..., I, O] of any float dtype.

    bytes_per_weight: of a large matrix, scales included. block: how many inputs share a scale; it must divide I. None:
    all inputs of an output.
    """

    name: str
    quantize: Callable[[jax.Array], QuantizedArray]
    bytes_per_weight: float
    block: int | None = None


def is_quantized(value: object) -> bool:
    """Whether a value is a QuantizedArray: the is_leaf of `jax.tree` functions that treat one as a leaf."""
    return isinstance(value, QuantizedArray)


def dense(kernel: jax.Array | QuantizedArray, dtype: DTypeLike) -> jax.Array:
    """The kernel in `dtype`, dequantised if it is quantised."""
    return kernel.dense(dtype) if isinstance(kernel, QuantizedArray) else kernel.astype(dtype)


def kernel_path(path: str) -> str:
    """The path of the kernel that an array at `path` is a part of and shares the axes of; any other path unchanged."""
    while path.endswith(("/codes", "/scales")):
        path = path.rpartition("/")[0]
    return path


def blocks(x: jax.Array, size: int) -> jax.Array:
    """[..., I, O] -> [..., I / size, size, O] float32."""
    *stack, inputs, outputs = x.shape
    return x.astype(jnp.float32).reshape(*stack, inputs // size, size, outputs)
