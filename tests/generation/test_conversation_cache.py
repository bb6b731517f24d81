"""The cache of a conversation, kept between turns: the answers of a full prefill, with less computed."""

import numpy as np
import pytest

from jaxft.errors import ConfigError
from jaxft.generation.conversation_cache import ConversationCache
from jaxft.generation.settings import Sampling
from jaxft.generation.tokens import generate_tokens
from jaxft.models import config_from_hf, random_model

SAMPLING = Sampling(max_new_tokens=20, repetition_penalty=1.3)
WINDOW = 8
LOCAL = {"model_type": "mistral", "sliding_window": WINDOW}
MIXED = {
    "model_type": "gemma3_text", "sliding_window": WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip


@pytest.fixture(scope="module", params=["full", "local", "mixed"])
def named(request, model, tiny_config):
    """(which layers have a window, the model)."""
    if request.param == "full":
        return request.param, model
    changes = {"local": LOCAL, "mixed": MIXED}[request.param]
    return request.param, random_model(config_from_hf(tiny_config(**changes)), seed=2)


def drawn(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def turn(model, prompt: list[int], cache: ConversationCache) -> list[int]:
    """The answer, which is that of a call without memory."""
    (ours,) = generate_tokens(model, [prompt], sampling=SAMPLING, cache=cache)
    (whole,) = generate_tokens(model, [prompt], sampling=SAMPLING)
    assert ours.tokens == whole.tokens
    np.testing.assert_allclose(ours.logprobs, whole.logprobs, rtol=0, atol=1e-4)
    return list(ours.tokens)


def test_a_turn_computes_what_is_new(named):
    kind, model = named
    cache, said = ConversationCache(), drawn(0, 10)
    answer = turn(model, said, cache)
    assert cache.computed == 10
    for seed in (1, 2):
        # The newest token of the answer was never in the cache.
        said = said + answer + drawn(seed, 5)
        answer = turn(model, said, cache)
        assert cache.computed == 6
    # History that is told otherwise: what stays the same is found again where no window has passed over it.
    retold = said[:-9] + drawn(3, 12)
    turn(model, retold, cache)
    assert cache.computed == (12 if kind == "full" else len(retold))


def test_the_same_prompt_again_and_a_shorter_one(named):
    kind, model = named
    cache, said = ConversationCache(), drawn(4, 6)
    turn(model, said, cache)
    turn(model, said, cache)
    assert cache.computed == (1 if kind == "full" else 6)
    turn(model, drawn(5, 6), cache)
    assert cache.computed == 6, "another conversation has nothing of this one"


def test_an_interrupted_call_leaves_nothing(model):
    cache, said = ConversationCache(), drawn(6, 6)

    def interrupt(*_):
        raise KeyboardInterrupt

    answer = turn(model, said, cache)
    with pytest.raises(KeyboardInterrupt):
        generate_tokens(model, [said + answer + [7]], sampling=SAMPLING, on_token=interrupt, cache=cache)
    turn(model, said + answer + [7], cache)
    assert cache.computed == len(said) + len(answer) + 1


def test_one_that_ended_early_ran_on_and_is_cut_back(named):
    # A callback ends a row after the device has gone on for a few tokens.
    kind, model = named
    cache, said, heard = ConversationCache(), drawn(7, 6), []
    (cut,) = generate_tokens(
        model, [said], sampling=SAMPLING, cache=cache, on_token=lambda *token: heard.append(token) or len(heard) == 3
    )
    assert len(cut.tokens) == 3
    turn(model, [*said, *cut.tokens, *drawn(8, 4)], cache)
    assert cache.computed in ((5,) if kind == "full" else (5, 13))


def test_a_cache_is_for_one_conversation(model):
    with pytest.raises(ConfigError, match="one conversation, and there are 2 prompts"):
        generate_tokens(model, [[1], [2]], sampling=SAMPLING, cache=ConversationCache())
