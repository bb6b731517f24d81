"""Prompt tuning: learned vectors in place of the embeddings of a few first tokens (arXiv:2104.08691)."""

# B batch, S sequence, D model, n virtual tokens

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.adapters.attach import AdapterParam
from jaxft.adapters.virtual_vectors import replace_virtual
from jaxft.config import AdapterConfig
from jaxft.errors import ModelError
from jaxft.nn import partition
from jaxft.nn.decoder import Decoder
from jaxft.nn.partition import Dimensions
from jaxft.nn.storage import StorageDims

PROMPT_DIMS: Dimensions = (None, "weight")


class Prompt(nnx.Module):
    """embeddings: [n, D], float32. They replace tokens' embeddings after these have been scaled."""

    peft_type = "PROMPT_TUNING"

    def __init__(self, embeddings_nD: jax.Array) -> None:
        self.embeddings = AdapterParam(embeddings_nD.astype(jnp.float32))

    def __call__(self, x_BSD: jax.Array, virtual_BS: jax.Array | None) -> jax.Array:
        """x_BSD: embedded tokens. virtual_BS: the number of the virtual token at each position, negative for none."""
        if virtual_BS is None:
            return x_BSD
        own_nD = partition.gather(self.embeddings.get_value().astype(x_BSD.dtype), PROMPT_DIMS, (None, None))
        return replace_virtual(x_BSD, own_nD, virtual_BS)

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"embeddings": StorageDims(PROMPT_DIMS)}


def attach_to(model: Decoder, config: AdapterConfig, key: jax.Array) -> None:
    """Attaches a prompt, initialized with the embeddings of random tokens. Raises what `attach_prompt` raises."""
    attach_prompt(model, jax.random.randint(key, (config.num_virtual_tokens,), 0, model.config.vocab_size))


def describe(config: AdapterConfig) -> str:
    """For people: `a prompt of 20 virtual tokens`."""
    return f"a prompt of {config.num_virtual_tokens} virtual tokens"


def attach_prompt(model: Decoder, tokens_n: jax.Array) -> None:
    """Attaches a prompt whose initial values are the embeddings of these tokens, int32.

    Raises ModelError if the model has virtual tokens already, or a table of its layers' inputs.
    """
    refuse_second(model)
    scale = 1.0 if model.embed_scale is None else model.embed_scale
    table_VD = model.embed_tokens.embedding.get_value()
    model.prompt = Prompt(scale * jnp.take(table_VD, tokens_n, axis=0).astype(jnp.float32))
    model.virtual_tokens = len(tokens_n)


def initialize_prompt(model: Decoder, tokens: Sequence[int]) -> None:
    """Sets a model's prompt to the embeddings of a text's tokens, repeated or cut to the prompt's length.

    Raises ModelError for a text without tokens.
    """
    if not len(tokens):
        raise ModelError(
            "adapter.prompt_init_text has no tokens: give a text, or None for the embeddings of random tokens"
        )
    count = model.virtual_tokens
    model.prompt, model.virtual_tokens = nnx.data(None), 0
    attach_prompt(model, jnp.array([tokens[i % len(tokens)] for i in range(count)], jnp.int32))


def refuse_second(model: Decoder) -> None:
    """Raises ModelError if a model has virtual tokens already, or a table with rows of tokens for every layer."""
    if model.per_layer is not None:
        raise ModelError(
            "virtual tokens have no rows in the table of the layers' inputs (embed_tokens_per_layer), which this model "
            "has beside that of embeddings. Use adapter.kind='lora'."
        )
    if model.virtual_tokens:
        raise ModelError(
            f"the model begins its rows with {model.virtual_tokens} virtual tokens already, and only one prompt "
            "or prefix can be active: attach the other to the base alone"
        )
