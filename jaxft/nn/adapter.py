"""What may stand in the adapter slot of a layer."""

from collections.abc import Mapping

import jax
from flax import nnx

from jaxft.nn.storage import StorageDims


class Adapter(nnx.Module):
    """Changes what a `Linear` is given, what it gives, or both; by default neither.

    One for experts is called with the rows of each in place of a key (`ExpertLinear`), one for a table with tokens and
    their rows alone (`Embedding`); neither is asked to `enter`.

    shared: arrays that all layers share and a model keeps once, put here for the length of a call; None elsewhere.
    stacks: whether others may stand in the same slot; False for a kind that reckons with the base's own results.
    on_product: whether it is for what the kernel gives alone, before the bias is added.
    """

    stacks, on_product = True, False

    def __init__(self) -> None:
        self.shared = nnx.data(None)

    def enter(self, x: jax.Array) -> jax.Array:
        """What the layer is given instead of x [..., I]."""
        return x

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, key: jax.Array | None) -> jax.Array:
        """What the layer gives instead of y [..., O]. x: [..., I], what it was given. key: turns dropout on."""
        return y

    def merged(self, kernel: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        """The kernel that does alone what both do together, float32. at: the place in the stack that `kernel` is of."""
        return kernel

    def merged_bias(self, bias: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        """The same of the bias, [*stack, O] or [O]."""
        return bias

    def storage_dims(self) -> Mapping[str, StorageDims]:
        """How the adapter's parameters are split over devices, by name; see `jaxft.nn.storage`."""
        return {}


def bind_shared(module: nnx.Module, arrays: object) -> None:
    """Puts shared arrays into every adapter inside a module."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Adapter):
            part.shared = nnx.data(arrays)
