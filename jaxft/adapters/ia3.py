"""IA3: learned factors on a layer's outputs, or on a feed-forward layer's inputs (arXiv:2205.05638, eq. 1)."""

# L stacked layers, I inputs, O outputs

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxft.adapters.attach import AdapterParam, Layer, MakeAdapter, attach, find, weight
from jaxft.config import AdapterConfig
from jaxft.config.adapter import split_names
from jaxft.nn import partition
from jaxft.nn.adapter import Adapter
from jaxft.nn.decoder import Decoder
from jaxft.nn.linear import Linear
from jaxft.nn.partition import Dimensions
from jaxft.nn.storage import StorageDims

FACTOR_DIMS: Dimensions = ("both",)
# The layout of the gathered factors. The key: whether the tensor axis splits the side that is scaled.
WHOLE: dict[bool, Dimensions] = {True: ("tensor",), False: (None,)}


class IA3(Adapter):
    """factors: [*stack, O], or [*stack, I] if `feedforward`, float32; initially 1, which changes nothing.

    is_split: whether the tensor axis splits the side that is scaled.
    """

    peft_type = "IA3"

    def __init__(self, size: int, *, feedforward: bool, is_split: bool, stack: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.factors = AdapterParam(jnp.ones((*stack, size), jnp.float32))
        self.feedforward = feedforward
        self.is_split = is_split

    def enter(self, x: jax.Array) -> jax.Array:
        return x * self._whole(x.dtype) if self.feedforward else x

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, key: jax.Array | None) -> jax.Array:
        return y if self.feedforward else y * self._whole(y.dtype)

    def _whole(self, dtype: jnp.dtype) -> jax.Array:
        return partition.gather(self.factors.get_value().astype(dtype), FACTOR_DIMS, WHOLE[self.is_split])

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"factors": StorageDims(FACTOR_DIMS)}

    def merged(self, kernel: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        factors = self.factors.get_value()[at]
        return kernel * (factors[..., :, None] if self.feedforward else factors[..., None, :])

    def merged_bias(self, bias: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        return bias if self.feedforward else bias * self.factors.get_value()[at]


def attach_to(model: Decoder, config: AdapterConfig, key: jax.Array) -> None:
    """Attaches fresh IA3 to the layers that a config names. Raises ModelError if the model lacks one of them."""
    attach_ia3(model, config.targets, split_names(config.feedforward_modules))


def describe(config: AdapterConfig) -> str:
    """For people: `IA3 on k_proj,v_proj,down_proj`."""
    return f"IA3 on {config.target_modules}"


def attach_ia3(model: Decoder, targets: Sequence[str], feedforward: Sequence[str]) -> tuple[str, ...]:
    """Puts IA3 into the slot of each target and returns the layers' paths.

    feedforward: names like targets; if a target is among them, its inputs are scaled instead of its outputs. Raises
    ModelError for a name that matches no layer.
    """
    scaled_at_inputs = set(find(model, feedforward))

    def factory(feedforward: bool) -> MakeAdapter:
        def make(layer: Layer, key: jax.Array) -> IA3:
            *stack, inputs, outputs = weight(layer).get_value().shape
            size, side = (inputs, "inputs") if feedforward else (outputs, "outputs")
            is_split = isinstance(layer, Linear) and layer.tp_side == side
            return IA3(size, feedforward=feedforward, is_split=is_split, stack=tuple(stack))

        return make

    paths = attach(model, targets, factory(False), jax.random.key(0))
    attach(model, sorted(scaled_at_inputs & set(paths)), factory(True), jax.random.key(0))
    return paths
