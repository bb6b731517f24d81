"""Prefixes in PEFT's folders: the one tensor `prompt_embeddings` [n, 2 L K H].

It holds the keys and then the values of each layer. If a prefix was trained behind an MLP (`prefix_projection`), PEFT
stores the MLP's output.
"""

# n virtual tokens, L layers, K kv heads, H head_dim

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxft.adapters.prefix import attach_prefix
from jaxft.checkpoint.peft.folder import PeftTensor, refuse_unknown
from jaxft.checkpoint.peft.prompt import KEY, one_submodule, virtual_tokens
from jaxft.checkpoint.tensors import TensorSpec
from jaxft.nn.decoder import Decoder
from jaxft.nn.stack import group_layers

PEFT_TYPE = "PREFIX_TUNING"
READ = ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers")
# Fields about how training began.
HARMLESS = ("encoder_hidden_size", "prefix_projection", "init_weights")


def attach_to(
    model: Decoder, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], folder: str
) -> tuple[str, ...]:
    """Attaches a prefix of the folder's length, values still to be read."""
    refuse_unknown(config, lambda name, value: name in READ or name in HARMLESS or one_submodule(name, value))
    attach_prefix(model, virtual_tokens(config, _sizes(model), folder), jax.random.key(0))
    return ()


def peft_tensors(model: Decoder) -> Iterator[PeftTensor]:
    """The part of the folder's one tensor that belongs to each layer."""
    width = _sizes(model)["token_dim"]
    for group, layers in enumerate(group_layers(model.segments)):
        for position, layer in enumerate(layers):
            for half, name in enumerate(("keys", "values")):
                start = (2 * layer + half) * width
                part = (slice(None), slice(start, start + width))
                yield PeftTensor(KEY, f"layers/{group}/self_attn/prefix/{name}", (position,), part=part)


def adapter_config_fields(model: Decoder) -> dict[str, Any]:
    """The fields of adapter_config.json for a model's prefix."""
    own = {"num_virtual_tokens": model.virtual_tokens, "num_transformer_submodules": 1, "prefix_projection": False}
    return own | _sizes(model)


def _sizes(model: Decoder) -> dict[str, int]:
    heads = model.config.num_key_value_heads
    width = heads * model.config.head_dim
    return {"token_dim": width, "num_attention_heads": heads, "num_layers": model.config.num_hidden_layers}
