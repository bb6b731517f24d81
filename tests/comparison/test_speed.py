"""What calls take, by a clock that tests turn, and what a model computes of texts that it does not answer."""

import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.assets import ASSETS
from jaxft.checkpoint.load import random_model
from jaxft.comparison.rivals import speed
from jaxft.comparison.rivals.cache import AnswerCache
from jaxft.comparison.rivals.peak import peak_bytes
from jaxft.comparison.rivals.states import log_probabilities, mean_states
from jaxft.data import load_tokenizer
from jaxft.errors import DataError

PROMPT, TOKEN = 0.01, 0.5  # seconds of a token of a prompt, and of an answer of 2 tokens


@pytest.fixture
def answer(monkeypatch):
    """A machine that computes a prefix of the prompts once, if that spares enough, and is slow at first."""
    now, seen = [100.0], {}
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call(prompts, slots, on_token):
        shared = speed.shared(prompts) if len(prompts) > 1 else 0
        shared = shared if shared * (len(prompts) - 1) >= speed.MIN_SPARED else 0
        key = (len(prompts), len(prompts[0]), on_token is None)
        # It compiles at first; of all later calls, every other one is slowed by something else.
        seen[key] = seen.get(key, 0) + 1
        now[0] += 7.0 if seen[key] % 2 else 0.0
        now[0] += PROMPT * (shared + sum(len(prompt) - shared for prompt in prompts))
        if on_token is not None:
            assert on_token(0, 1, -0.1) is True
        else:
            now[0] += 2 * TOKEN

    return call


@pytest.mark.parametrize("prefix", [20, 60, 100])
def test_seconds_with_and_without_a_cached_prefix(answer, prefix):
    prompts = [[*range(prefix), 1000 + number, *[5] * 9] for number in range(10)]
    found = speed.call_seconds(answer, prompts, 8)
    whole = PROMPT * (prefix + 10)
    assert found["seconds_to_first"] == pytest.approx(whole)
    assert found["seconds_alone"] == pytest.approx(whole + 2 * TOKEN)
    assert found["seconds_side_by_side"] == pytest.approx(whole + 2 * TOKEN / 8)
    told_apart = prefix if prefix >= speed.LEAST_PREFIX else 0
    assert found["seconds_of_prefix"] == pytest.approx(PROMPT * told_apart)
    assert found["seconds_cached"] == pytest.approx(whole + 2 * TOKEN / 8 - PROMPT * told_apart)


def test_vectors_are_kept_and_a_damaged_file_is_left_out(tmp_path, caplog):
    cache, vectors = AnswerCache(tmp_path), {"a": np.arange(3.0), "b": np.ones(3)}
    assert cache.vectors("x") == {}
    cache.keep_vectors("x", vectors)
    kept = cache.vectors("x")
    assert kept.keys() == vectors.keys() and all(np.array_equal(kept[key], vectors[key]) for key in vectors)
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:40])
    assert cache.vectors("x") == {} and "is damaged" in caplog.text


@pytest.fixture(scope="module")
def model():
    return random_model(str(ASSETS / "smoke"), seed=0, dtype="float32", param_dtype="float32").module


def test_memory_is_that_of_the_arrays(model):
    found = speed.memory(model, 3, 64)
    weights = sum(array.nbytes for array in jax.tree.leaves(nnx.state(model)))
    cache = lambda length: sum(array.nbytes for array in jax.tree.leaves(model.init_cache(3, length)))  # noqa: E731
    assert found["memory_bytes"] == weights + cache(64) and found["memory_by"] == "arithmetic"
    assert found["cache_bytes_per_token"] * 64 * 3 == pytest.approx(cache(128) - cache(64), abs=3 * 64)
    assert found["parameters"] == sum(array.size for array in jax.tree.leaves(nnx.state(model)))


class Device:
    """A device that says what the test sets, and when it was asked for that."""

    def __init__(self, in_use, peak):
        self.in_use, self.peak, self.seen = in_use, peak, {}

    def memory_stats(self):
        stats = {"bytes_in_use": self.in_use, "peak_bytes_in_use": self.peak}
        self.seen.setdefault(stats["bytes_in_use"], threading.Event()).set()
        return stats

    def run(self, in_use, peak):
        """Has so much in use until that was looked at."""
        event = self.seen.setdefault(in_use, threading.Event())
        before, self.in_use, self.peak = self.in_use, in_use, max(self.peak, peak)
        assert event.wait(60)
        self.in_use = before


def test_peak_memory_is_what_devices_say():
    one, other = Device(10, 500), Device(20, 90)

    def call():
        one.run(300, 400)  # below the peak of its process
        other.run(30, 95)  # a new peak, between two looks

    assert peak_bytes(call, [one, other]) == 300 + 95
    assert peak_bytes(lambda: None, [one, other]) == 10 + 20
    assert peak_bytes(lambda: pytest.fail("called"), jax.devices()) is None  # a CPU does not say


def test_states_and_log_probabilities_are_those_of_the_model(model):
    tokenizer = load_tokenizer(ASSETS / "smoke")
    texts = ["A short text.", "Another one, which is somewhat longer."]
    rows = [tokenizer.encode(text) for text in texts]
    found, logps = mean_states(model, tokenizer, texts), log_probabilities(model, rows)
    for row, vector_D, logps_SV in zip(rows, found, logps, strict=True):
        hidden_1SD, _ = model(jnp.array([row]), None, jnp.ones((1, len(row)), jnp.int32))
        np.testing.assert_allclose(vector_D, hidden_1SD[0].mean(0), rtol=1e-4, atol=1e-5)
        expected_SV = jax.nn.log_softmax(model.unembed(hidden_1SD)[0].astype(jnp.float32), axis=-1)
        np.testing.assert_allclose(logps_SV, expected_SV[:-1], rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="has no next token"):
        log_probabilities(model, [rows[0][:1]])
