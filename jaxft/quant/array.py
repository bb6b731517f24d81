"""A quantised weight as one value: what stands where a kernel stood, until a layer needs the kernel itself."""

# I inputs, O outputs

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp

# Below every scale that counts: the least float32 that no device takes for zero.
TINY = float(jnp.finfo(jnp.float32).tiny)


class QuantizedArray(ABC):
    """A pytree of arrays that means one array [..., I, O].

    The leading axes are stacks, of layers and of experts; every array inside has them too, so that a scan over layers
    takes one layer's part of each.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the array that is meant."""

    @abstractmethod
    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """The array that is meant, computed in float32 and rounded to `dtype` once."""

    @abstractmethod
    def map_arrays(self, change: Callable[[jax.Array], jax.Array]) -> Self:
        """With `change` applied to every array inside that has the axes I and O, of however many elements."""

    @property
    def ndim(self) -> int:
        """Of the array that is meant."""
        return len(self.shape)

    def __getitem__(self, at: tuple[int, ...] | int) -> Self:
        """The part at a place on the leading axes."""
        return jax.tree.map(lambda part: part[at], self)


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to quantise. name: for users. quantise: of an array [..., I, O], whatever its float type.

    bytes_per_weight: what one weight of a large matrix takes, scales included. block: how many inputs share a scale,
    which must divide I; None: all.
    """

    name: str
    quantize: Callable[[jax.Array], QuantizedArray]
    bytes_per_weight: float
    block: int | None = None


def is_quantized(value: object) -> bool:
    """For `jax.tree` functions that must not look inside: their is_leaf."""
    return isinstance(value, QuantizedArray)


def dense(kernel: jax.Array | QuantizedArray, dtype: jnp.dtype) -> jax.Array:
    """The kernel in `dtype`, whichever way it is stored."""
    return kernel.dense(dtype) if isinstance(kernel, QuantizedArray) else kernel.astype(dtype)


def kernel_path(path: str) -> str:
    """The path of a kernel from that of an array inside it that has its axes; any other path as it is."""
    while path.endswith(("/codes", "/scales")):
        path = path.rpartition("/")[0]
    return path


def blocks(x: jax.Array, size: int) -> jax.Array:
    """[..., I, O] -> [..., I / size, size, O] float32."""
    *stack, inputs, outputs = x.shape
    return x.astype(jnp.float32).reshape(*stack, inputs // size, size, outputs)
