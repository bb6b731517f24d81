"""A tiny Llama with random weights and a tokenizer of single bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.models import config_from_hf, random_model
from jaxft.nn.attention import cache as kv


def tiny_hf(**changes):
    return {
        "model_type": "llama",
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        # Wide, so that the likeliest token is well ahead of the next.
        "initializer_range": 0.3,
        **changes,
    }


@pytest.fixture(scope="session")
def tiny_config():
    """config.json of the tiny model, with changes."""
    return tiny_hf


@pytest.fixture(scope="session")
def model():
    return random_model(config_from_hf(tiny_hf()), seed=1)


@pytest.fixture(scope="session")
def prompts():
    """Ragged prompts of one bucket, since each new shape costs seconds of compilation."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, n).tolist() for n in (5, 1, 16, 9, 12, 14, 3, 7, 16, 2)]


@pytest.fixture(scope="session")
def logprobs_of():
    """The log-softmax of a whole sequence by one pass without a cache, [48, V]."""

    @functools.partial(jax.jit, static_argnums=0)
    def forward(graphdef, params, tokens_BS):
        model = nnx.merge(graphdef, params)
        return jax.nn.log_softmax(model.unembed(model(tokens_BS)[0])[0])

    def compute(model, tokens):
        return np.asarray(forward(*nnx.split(model), np.array([tokens + [0] * (48 - len(tokens))], np.int32)))

    return compute


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<pad>", "<|im_end|>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>")
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return Tokenizer(fast, name="bytes")


class Scripted(nnx.Module):
    """Says given tokens: what follows a token depends on its position alone."""

    def __init__(self, ids):
        self.script_N = nnx.Param(jnp.array(ids, jnp.int32))
        self.config, self.virtual_tokens = config_from_hf(tiny_hf()), 0

    def __call__(self, tokens_BS, positions_BS=None, segments_BS=None, cache=None, key=None):
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
        following_BS = self.script_N.get_value()[positions_BS + 1]
        return jax.nn.one_hot(following_BS, self.config.vocab_size), cache

    def unembed(self, hidden):
        return 50.0 * hidden

    def for_length(self, length):
        return self

    def init_cache(self, batch, length):
        return (kv.empty(1, batch, length, 1, 1, jnp.float32),)


@pytest.fixture(scope="session")
def scripted(tokenizer):
    """Makes a model that says the text from its first character on; ids after it."""

    def make(text, *ids):
        return Scripted([*tokenizer.encode(text), *ids])

    return make
