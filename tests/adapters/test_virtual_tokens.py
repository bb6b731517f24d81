"""Prompts and prefixes: how they begin, what is refused, and how rows with virtual tokens are shown."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxft import models
from jaxft.adapters.attach import adapters
from jaxft.adapters.ia3 import attach_ia3
from jaxft.adapters.make import attach_adapter
from jaxft.adapters.prefix import attach_prefix
from jaxft.adapters.prompt import attach_prompt, initialize_prompt
from jaxft.adapters.vera import VeRASettings, attach_vera
from jaxft.adapters.virtual_vectors import replace_virtual
from jaxft.assets import ASSETS
from jaxft.config import AdapterConfig
from jaxft.data.batch import Example
from jaxft.data.show import render_rows
from jaxft.errors import ModelError
from jaxft.nn.virtual import virtual_ids


@pytest.fixture
def module(smoke_config):
    return models.random_model(models.config_from_hf(smoke_config | {"tie_word_embeddings": False}), seed=0)


def test_a_prompt_begins_as_words(module):
    attach_adapter(module, AdapterConfig(kind="prompt", num_virtual_tokens=5), 0)
    table = np.asarray(module.embed_tokens.embedding.get_value())
    rows = np.asarray(module.prompt.embeddings.get_value())
    assert len(np.unique(rows, axis=0)) == 5 and all((table == row).all(axis=1).any() for row in rows)
    initialize_prompt(module, [7, 11])
    np.testing.assert_array_equal(module.prompt.embeddings.get_value(), table[[7, 11, 7, 11, 7]])
    initialize_prompt(module, list(range(9)))
    np.testing.assert_array_equal(module.prompt.embeddings.get_value(), table[:5])
    with pytest.raises(ModelError, match="adapter.prompt_init_text has no tokens"):
        initialize_prompt(module, [])


def test_a_prompt_of_words_computes_what_the_words_do(module):
    tokens = np.array([[3, 1, 4, 1, 5, 9]], np.int32)
    expected = module(tokens)[0]
    attach_prompt(module, jnp.array([3, 1]))
    ours = module(np.array([[*virtual_ids(2), 4, 1, 5, 9]], np.int32))[0]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def test_virtual_tokens_are_replaced_and_no_others():
    x_BSD, own_nD = jnp.zeros((2, 3, 4)), jnp.arange(8.0).reshape(2, 4)
    virtual_BS = jnp.array([[0, 1, -5], [-(2**30), 1, 0]])
    out = replace_virtual(x_BSD, own_nD, virtual_BS)
    np.testing.assert_array_equal(out[0], [own_nD[0], own_nD[1], x_BSD[0, 2]])
    np.testing.assert_array_equal(out[1], [x_BSD[1, 0], own_nD[1], own_nD[0]])


def test_a_second_prompt_or_prefix_is_refused(module):
    attach_prefix(module, 4, jax.random.key(0))
    with pytest.raises(ModelError, match="begins its rows with 4 virtual tokens already"):
        attach_prompt(module, jnp.arange(3))


def test_a_prefix_of_layers_with_keys_of_different_widths_is_refused():
    """PEFT keeps the prefix of all layers in one array."""
    hf = json.loads((ASSETS / "published" / "gemma-4-12b-text.json").read_text(encoding="utf-8"))
    with pytest.raises(ModelError, match="one width"):
        attach_prefix(models.abstract_model(models.config_from_hf(hf)), 4, jax.random.key(0))


def test_vera_leaves_the_head_alone(module):
    with pytest.raises(ModelError, match="leave lm_head out of its targets"):
        attach_vera(module, ("q_proj", "lm_head"), VeRASettings(r=4))
    assert not adapters(module)


def test_a_feed_forward_name_that_matches_nothing_is_refused(module):
    with pytest.raises(ModelError, match="'dwon_proj' matches no layer. Did you mean 'down_proj'"):
        attach_ia3(module, ("q_proj",), ("dwon_proj",))


def test_rows_are_shown_without_their_virtual_tokens():
    class Letters:
        def decode(self, tokens, skip_special_tokens):
            return "".join(chr(token) for token in tokens)

    example = Example(
        tokens=np.frombuffer(b"hi there", np.uint8).astype(np.int32), mask=np.array([0] * 3 + [1] * 5), row=0
    )
    out = io.StringIO()
    render_rows([example.prepend(virtual_ids(6))], Letters(), console=Console(file=out, width=100))
    assert out.getvalue().strip() == "row 0: 14 tokens, the first 6 virtual, 5 trained\nhi [[there]]"
