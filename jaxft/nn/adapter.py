"""Adapters of layers: base classes for the adapter slot of a Linear, an Embedding or an ExpertLinear."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxft.nn.storage import StorageDims


class LayerAdapter(nnx.Module):
    """An adapter of any layer.

    shared: arrays that the adapters of all layers share; the model keeps them once and sets them for the length of a
    call. None otherwise. stacks: whether other adapters may be in the same slot; False for a kind that depends on the
    base's own results. peft_type: its name in PEFT.
    """

    peft_type = ""
    stacks = True

    def __init__(self) -> None:
        self.shared: Any = nnx.data(None)

    @property
    def adds_bias(self) -> bool:
        """Whether the adapter adds a bias of its own to the layer's output."""
        return False

    def merged(self, kernel: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        """The kernel that has the effect of `kernel` and the adapter, float32. at: the stack index of `kernel`."""
        return kernel

    def merged_bias(self, bias: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        """The bias that has the effect of `bias`, [*stack, O] or [O], and the adapter."""
        return bias

    def storage_dims(self) -> Mapping[str, StorageDims]:
        """How the adapter's parameters are split over devices, by name; see `jaxft.nn.storage`."""
        return {}


class Adapter(LayerAdapter):
    """An adapter of a Linear, which may transform its input, its output or both. The base class transforms neither.

    on_product: whether it transforms the product with the kernel alone, before the bias is added.
    """

    on_product = False

    def enter(self, x: jax.Array) -> jax.Array:
        """The layer's input, given x [..., I]."""
        return x

    def __call__(self, x: jax.Array, y: jax.Array, kernel: Any, key: jax.Array | None) -> jax.Array:
        """The layer's output, given y [..., O] of the base layer and its input x [..., I]. key: turns dropout on."""
        return y

    @classmethod
    def additions(
        cls, adapters: Sequence[Self], x: jax.Array, keys: Sequence[jax.Array | None]
    ) -> Sequence[jax.Array] | None:
        """What each of several adapters of this class adds to the output of its layer, computed at once from the one
        input x [..., I] of all layers. None if these adapters work apart, as `__call__` does.
        """
        return None


class EmbeddingAdapter(LayerAdapter):
    """An adapter of an Embedding."""

    @abstractmethod
    def __call__(self, tokens_BS: jax.Array, x_BSD: jax.Array) -> jax.Array:
        """The embedded tokens, given x_BSD, the table's rows of tokens_BS."""


class ExpertAdapter(LayerAdapter):
    """An adapter of an ExpertLinear."""

    @abstractmethod
    def __call__(self, x: jax.Array, y: jax.Array, kernel: Any, sizes_E: jax.Array) -> jax.Array:
        """The layer's output, given y [R, O] of the base layer and its input x [R, I].

        sizes_E: numbers of rows; the rows of expert 0 are first, then those of expert 1 and so on.
        """


class RowNumbers(nnx.Module):
    """The number of each row's adapter, [B] int32, for the slot `Decoder.shared`: adapters read it as `shared`."""

    def __init__(self, numbers_B: jax.Array) -> None:
        self.numbers_B = nnx.Variable(numbers_B)

    def arrays(self, dtype: DTypeLike) -> jax.Array:
        """The numbers, whatever the type of computation."""
        return self.numbers_B.get_value()


def bind_shared(module: nnx.Module, arrays: object) -> None:
    """Sets `shared` of every adapter inside a module."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, LayerAdapter):
            part.shared = nnx.data(arrays)
