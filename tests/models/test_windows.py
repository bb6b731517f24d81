"""Layers with a window keep window-sized caches, and whatever comes in whatever portions gives what one pass gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.generation import engine
from jaxft.generation.settings import Sampling
from jaxft.generation.tokens import generate_tokens
from jaxft.models import config_from_hf, random_model

WINDOW = 6
GEMMA = {
    "model_type": "gemma3_text", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": WINDOW,
    "sliding_window_pattern": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 30))


@pytest.fixture(scope="module")
def model():
    return random_model(config_from_hf(GEMMA), seed=0)


@pytest.fixture(scope="module")
def whole(model):
    return np.asarray(jax.jit(lambda: model.unembed(model(jnp.asarray(TOKENS))[0]))())


def test_caches_are_as_long_as_the_window_or_the_row_if_that_is_shorter(model):
    # local, global, local: the pattern repeats once and a half.
    assert [part.slots for part in model.init_cache(1, 40)] == [WINDOW, 40, WINDOW]
    assert [part.slots for part in model.init_cache(1, 4)] == [4, 4, 4]


@pytest.mark.parametrize("portions", [(30,), (1,) * 12, (11, 1, 1, 9, 8), (3, 3, 3), (6, 1, 7, 1)], ids=str)
def test_portions_give_what_one_pass_gives(model, whole, portions):
    @jax.jit
    def step(tokens, positions, cache):
        hidden, cache = model(tokens, positions, None, cache)
        return model.unembed(hidden), cache

    cache, at, parts = model.init_cache(2, 32), 0, []
    for size in portions:
        positions = np.broadcast_to(np.arange(at, at + size), (2, size))
        logits, cache = step(TOKENS[:, at : at + size], positions, cache)
        parts.append(logits)
        at += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole[:, :at], rtol=0, atol=1e-4)


def test_ragged_rows_with_padding(model, whole):
    """A row of 4 beside one of 13: what is stored of each is its own last tokens."""
    segments = np.zeros((2, 16), np.int32)
    segments[0, :4], segments[1, :13] = 1, 1
    positions = np.broadcast_to(np.arange(16), (2, 16))

    @jax.jit
    def run(tokens, cache):
        hidden, cache = model(tokens, positions, segments, cache)
        after, _ = model(jnp.stack([TOKENS[:1, 4], TOKENS[1:, 13]]), jnp.array([[4], [13]]), None, cache)
        return model.unembed(hidden), model.unembed(after), cache

    logits, after, cache = run(jnp.asarray(TOKENS[:, :16]), model.init_cache(2, 32))
    np.testing.assert_array_equal(np.sort(cache[0].positions_BT, axis=1), [[-1, -1, 0, 1, 2, 3], [7, 8, 9, 10, 11, 12]])
    np.testing.assert_allclose(logits[0, :4], whole[0, :4], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[1, :13], whole[1, :13], rtol=0, atol=1e-4)
    np.testing.assert_allclose(after[:, 0], [whole[0, 4], whole[1, 13]], rtol=0, atol=1e-4)


def test_a_common_prefix_longer_than_the_window(model, monkeypatch):
    prompts = [TOKENS[0, :14].tolist() + TOKENS[1, :n].tolist() for n in (2, 5, 1)]
    apart = generate_tokens(model, prompts, sampling=Sampling(max_new_tokens=16))
    monkeypatch.setattr(engine, "MIN_SPARED", 8)
    assert engine._common_prefix(prompts) == 14
    together = generate_tokens(model, prompts, sampling=Sampling(max_new_tokens=16))
    assert [r.tokens for r in together] == [r.tokens for r in apart]


LONGROPE = {
    "model_type": "phi3", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
    "original_max_position_embeddings": 16,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.5, 4.0, 9.0, 20.0]},
}  # fmt: skip


def test_longrope_goes_by_the_length_of_each_document():
    model = random_model(config_from_hf(LONGROPE), seed=0)

    @jax.jit
    def logits(tokens, positions, segments):
        return model.unembed(model(tokens, positions, segments)[0])

    short, long = TOKENS[0, :10], TOKENS[1, :20]
    packed = np.concatenate([short, long])[None]
    positions = np.concatenate([np.arange(10), np.arange(20)])[None]
    segments = np.array([[1] * 10 + [2] * 20])
    alone = [logits(t[None], np.arange(len(t))[None], np.ones((1, len(t)), int))[0] for t in (short, long)]
    np.testing.assert_allclose(logits(packed, positions, segments)[0], np.concatenate(alone), rtol=0, atol=1e-5)
    shortened = logits(long[None, :10], np.arange(10)[None], np.ones((1, 10), int))[0]
    assert np.abs(shortened - alone[1][:10]).max() > 1e-3


def test_longrope_generates_with_the_factors_of_the_longest_row():
    model = random_model(config_from_hf(LONGROPE), seed=0)
    prompt = TOKENS[0, :8].tolist()
    for new in (8, 16):  # up to the original length, and beyond
        (made,) = generate_tokens(model, [prompt], sampling=Sampling(max_new_tokens=new))
        fixed = model.for_length(len(prompt) + new)
        row = np.array([prompt + list(made.tokens)])
        expected = jax.jit(lambda m=fixed, row=row: m.unembed(m(row)[0]))()[0].argmax(-1)
        assert list(made.tokens) == expected[len(prompt) - 1 : -1].tolist()
    ropes = [nnx.merge(*nnx.split(model)).for_length(n).ropes[0] for n in (16, 17)]
    assert [rope.long_factor for rope in ropes] == [model.ropes[0].short_factor, model.ropes[0].long_factor]
