"""Prompts in PEFT's folders: the one tensor `prompt_embeddings` [n, D]."""

# n virtual tokens, D model

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from jaxft.adapters.prompt import attach_prompt
from jaxft.checkpoint.peft.folder import PeftTensor, refuse_unknown
from jaxft.checkpoint.tensors import TensorSpec
from jaxft.errors import ModelError
from jaxft.nn.decoder import Decoder

PEFT_TYPE = "PROMPT_TUNING"
KEY = "prompt_embeddings"
READ = ("num_virtual_tokens", "token_dim", "num_layers")
# Fields about how training began.
HARMLESS = (
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "num_attention_heads",
)  # fmt: skip


def attach_to(
    model: Decoder, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], folder: str
) -> tuple[str, ...]:
    """Attaches a prompt of the folder's length, values still to be read."""
    refuse_unknown(config, lambda name, value: name in READ or name in HARMLESS or one_submodule(name, value))
    count = virtual_tokens(config, {"token_dim": model.config.hidden_size}, folder)
    attach_prompt(model, jnp.zeros(count, jnp.int32))
    return ()


def peft_tensors(model: Decoder) -> Iterator[PeftTensor]:
    """The folder's one tensor for a model's prompt."""
    yield PeftTensor(KEY, "prompt/embeddings")


def adapter_config_fields(model: Decoder) -> dict[str, Any]:
    """The fields of adapter_config.json for a model's prompt."""
    return {
        "num_virtual_tokens": model.virtual_tokens,
        "token_dim": model.config.hidden_size,
        "num_attention_heads": model.config.num_attention_heads,
        "num_layers": model.config.num_hidden_layers,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }


def one_submodule(name: str, value: Any) -> bool:
    """Whether the field says that the base is one stack of layers, not an encoder and a decoder."""
    return (name, value) == ("num_transformer_submodules", 1)


def virtual_tokens(config: Mapping[str, Any], own: Mapping[str, Any], folder: str) -> int:
    """Number of virtual tokens by an adapter_config.json. own: the model's value of fields that must agree with it.

    Raises ModelError for a number below 1, and if a field has another value than the model.
    """
    count = config.get("num_virtual_tokens")
    if not isinstance(count, int) or count < 1:
        raise ModelError(f"adapter_config.json has num_virtual_tokens={count!r}; it is a whole number above zero")
    wrong = [
        f"{name}={config[name]!r}, the model has {value}"
        for name, value in own.items()
        if config.get(name) not in (None, value)
    ]
    if wrong:
        raise ModelError(f"the adapter in {folder} belongs to another model: {'; '.join(wrong)}")
    return count
