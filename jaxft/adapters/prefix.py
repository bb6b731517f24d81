"""Prefix tuning: learned keys and values at the start of every row, in each layer (arXiv:2101.00190).

The published reparameterisation by an MLP is left out: only its keys and values are kept after training anyway.
"""

# B batch, S sequence, K kv heads, H head_dim, n virtual tokens

import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.adapters.attach import AdapterParam
from jaxft.adapters.prompt import refuse_second
from jaxft.adapters.virtual_vectors import replace_virtual
from jaxft.config import AdapterConfig
from jaxft.errors import ModelError
from jaxft.nn import partition
from jaxft.nn.decoder import Decoder
from jaxft.nn.partition import Dimensions
from jaxft.nn.stack import group_layers
from jaxft.nn.storage import StorageDims

PREFIX_DIMS: Dimensions = (None, "both")
WHOLE: Dimensions = (None, "tensor")
STDDEV = 0.02


class Prefix(nnx.Module):
    """keys, values: [*stack, n, K * H], float32. The keys are not rotated: they take the place of rotated ones."""

    peft_type = "PREFIX_TUNING"

    def __init__(self, keys: jax.Array, values: jax.Array) -> None:
        self.keys, self.values = AdapterParam(keys), AdapterParam(values)

    def __call__(
        self, k_BSKH: jax.Array, v_BSKH: jax.Array, virtual_BS: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values, at virtual tokens this layer's own. virtual_BS: number of the virtual token, or below 0."""
        if virtual_BS is None:
            return k_BSKH, v_BSKH
        own = (
            partition.gather(half.get_value().astype(k_BSKH.dtype), PREFIX_DIMS, WHOLE)
            for half in (self.keys, self.values)
        )
        heads = k_BSKH.shape[2:]
        k_BSKH, v_BSKH = (
            replace_virtual(x, half.reshape(-1, *heads), virtual_BS)
            for x, half in zip((k_BSKH, v_BSKH), own, strict=True)
        )
        return k_BSKH, v_BSKH

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"keys": StorageDims(PREFIX_DIMS), "values": StorageDims(PREFIX_DIMS)}


def attach_to(model: Decoder, config: AdapterConfig, key: jax.Array) -> None:
    """Attaches a prefix of the configured number of virtual tokens. Raises what `attach_prefix` raises."""
    attach_prefix(model, config.num_virtual_tokens, key)


def describe(config: AdapterConfig) -> str:
    """For people: `a prefix of 20 virtual tokens`."""
    return f"a prefix of {config.num_virtual_tokens} virtual tokens"


def attach_prefix(model: Decoder, count: int, key: jax.Array) -> None:
    """Gives every layer a prefix of `count` virtual tokens, normal with deviation STDDEV.

    Raises ModelError if the model has virtual tokens already or a table of its layers' inputs, if one of its layers has
    no keys and values, and if those of its layers have different widths.
    """
    refuse_second(model)
    attentions = [group.attention for group in model.layers if group.attention is not None]
    if len(attentions) < len(model.layers):
        raise ModelError(
            "adapter.kind='prefix' gives every layer keys and values of virtual tokens, and some layers of this model "
            "have no attention. Use adapter.kind='lora' or 'prompt'."
        )
    if len({attention.shape.kv_heads * attention.shape.head_dim for attention in attentions}) > 1:
        raise ModelError(
            "adapter.kind='prefix' gives every layer keys and values of one width, as PEFT keeps them, and those of "
            "this model's layers differ. Use adapter.kind='lora' or 'prompt'."
        )
    for index, (attention, layers) in enumerate(zip(attentions, group_layers(model.segments), strict=True)):
        shape = attention.shape
        size = (len(layers), count, shape.kv_heads * shape.head_dim)
        halves = jax.random.split(jax.random.fold_in(key, zlib.crc32(f"layers/{index}".encode())))
        attention.prefix = Prefix(*(STDDEV * jax.random.normal(half, size, jnp.float32) for half in halves))
    model.virtual_tokens = count
