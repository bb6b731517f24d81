"""IA3: learnt factors on what a layer gives, or on what a feed-forward layer is given (arXiv:2205.05638, eq. 1)."""

# L stacked layers, I inputs, O outputs

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.adapters.attach import AdapterParam, attach, find
from jaxft.config import AdapterConfig
from jaxft.nn import partition
from jaxft.nn.adapter import Adapter
from jaxft.nn.linear import Linear
from jaxft.nn.partition import Dimensions
from jaxft.nn.storage import StorageDims

FACTOR_DIMS: Dimensions = ("both",)
# Whether the tensor axis splits the side that is scaled.
WHOLE = {True: ("tensor",), False: (None,)}


class IA3(Adapter):
    """factors: [*stack, O], or [*stack, I] where `feedforward`, float32; ones at first, which change nothing."""

    peft_type = "IA3"

    def __init__(self, size: int, *, feedforward: bool, tp_side: bool, stack: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.factors = AdapterParam(jnp.ones((*stack, size), jnp.float32))
        self.feedforward = feedforward
        self.tp_side = tp_side

    def enter(self, x: jax.Array) -> jax.Array:
        """What the layer is given instead of x [..., I]."""
        return x * self._whole(x.dtype) if self.feedforward else x

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, key: jax.Array | None) -> jax.Array:
        """y: [..., O], what the layer gave, its bias included."""
        return y if self.feedforward else y * self._whole(y.dtype)

    def _whole(self, dtype: jnp.dtype) -> jax.Array:
        return partition.gathered(self.factors.get_value().astype(dtype), FACTOR_DIMS, WHOLE[self.tp_side])

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"factors": StorageDims(FACTOR_DIMS)}

    def merged(self, kernel: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        """As `Adapter.merged`."""
        factors = self.factors.get_value()[at]
        return kernel * (factors[..., :, None] if self.feedforward else factors[..., None, :])

    def merged_bias(self, bias: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        """As `Adapter.merged_bias`."""
        return bias if self.feedforward else bias * self.factors.get_value()[at]


def put(model: nnx.Module, config: AdapterConfig, key: jax.Array) -> None:
    """Fresh IA3 on the layers that a run's config names. Raises ModelError for what the model does not have."""
    attach_ia3(model, config.targets, tuple(n.strip() for n in config.feedforward_modules.split(",") if n.strip()))


def attach_ia3(model: nnx.Module, targets: Sequence[str], feedforward: Sequence[str]) -> tuple[str, ...]:
    """Puts IA3 into the slot of each target and returns their paths.

    feedforward: names as in targets; where a target is among them, its inputs are scaled. Raises ModelError for a name
    that matches nothing.
    """
    inward = set(find(model, feedforward))

    def beside(inwards: bool) -> Callable[[Linear, jax.Array], IA3]:
        def make(layer: Linear, key: jax.Array) -> IA3:
            *stack, inputs, outputs = layer.kernel.get_value().shape
            tp_side = (layer.tp_side == "inputs") == inwards
            return IA3(inputs if inwards else outputs, feedforward=inwards, tp_side=tp_side, stack=tuple(stack))

        return make

    paths = attach(model, targets, beside(False), jax.random.key(0))
    attach(model, sorted(inward & set(paths)), beside(True), jax.random.key(0))
    return paths
