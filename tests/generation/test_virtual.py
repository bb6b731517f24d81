"""A prompt or a prefix in generation: through the cache and behind common beginnings, it is what one pass is."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxft.adapters.attach import AdapterParam
from jaxft.adapters.make import attach_adapter
from jaxft.config import AdapterConfig
from jaxft.errors import DataError
from jaxft.generation import engine
from jaxft.generation.conversation_cache import ConversationCache
from jaxft.generation.settings import Sampling
from jaxft.generation.tokens import generate_tokens
from jaxft.nn.virtual import virtual_ids


@pytest.fixture(scope="module", params=["prompt", "prefix"])
def tuned(model, request):
    tuned = nnx.merge(*nnx.split(model))
    attach_adapter(tuned, AdapterConfig(kind=request.param, num_virtual_tokens=4), 0)
    state = nnx.state(tuned, AdapterParam)
    nnx.update(tuned, jax.tree.map(lambda x: x + 0.5 * jax.random.normal(jax.random.key(1), x.shape), state))
    return tuned


def test_greedy_tokens_and_their_probabilities_are_those_of_one_pass(tuned, model, prompts, logprobs_of, monkeypatch):
    sampling = Sampling(max_new_tokens=6, temperature=0.0)
    answers = generate_tokens(tuned, prompts, sampling=sampling, slots=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = [*virtual_ids(4), *prompt, *answer.tokens]
        expected = logprobs_of(tuned, whole)[len(whole) - 7 : len(whole) - 1]
        assert answer.tokens == tuple(expected.argmax(axis=1))
        np.testing.assert_allclose(answer.logprobs, expected.max(axis=1), rtol=0, atol=1e-4)
    base = generate_tokens(model, prompts, sampling=sampling, slots=4)
    assert any(a.tokens != b.tokens for a, b in zip(answers, base, strict=True))
    monkeypatch.setattr(engine, "MIN_SPARED", 1)  # the virtual tokens are computed once for all rows
    apart = generate_tokens(tuned, prompts, sampling=sampling, slots=4)
    assert [a.tokens for a in apart] == [a.tokens for a in answers]


def test_virtual_tokens_take_positions(tuned):
    with pytest.raises(DataError, match="row 0: 250 . 3 = 253"):
        generate_tokens(tuned, [[1] * 250], sampling=Sampling(max_new_tokens=3))


def test_the_cache_of_a_conversation_holds_them_and_is_left_when_weights_change(tuned):
    sampling = Sampling(max_new_tokens=4, repetition_penalty=1.3)
    tuned = nnx.clone(tuned)

    def turn(prompt, cache):
        (ours,) = generate_tokens(tuned, [prompt], sampling=sampling, cache=cache)
        (whole,) = generate_tokens(tuned, [prompt], sampling=sampling)
        assert ours.tokens == whole.tokens
        np.testing.assert_allclose(ours.logprobs, whole.logprobs, rtol=0, atol=1e-4)
        return [*prompt, *ours.tokens]

    cache = ConversationCache()
    said = turn([3, 5, 7], cache)
    assert cache.computed == 4 + 3
    said = turn([*said, 9], cache)
    assert cache.computed == 2  # the newest token of the answer was not in the cache yet
    nnx.update(tuned, jax.tree.map(lambda x: -x, nnx.state(tuned, AdapterParam)))
    turn([*said, 9], cache)
    assert cache.computed == 4 + len(said) + 1
