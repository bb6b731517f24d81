import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.generation import sampling
from jaxft.generation.sampling import Knobs

ROWS, VOCAB = 5, 300


def knobs(rows=ROWS, **values):
    neutral = {"temperature": 0.0, "top_k": 10**6, "top_p": 1.0, "min_p": 0.0, "penalty": 1.0, "seed": 0, "stream": 0}
    neutral["logprob_temperature"] = 1.0
    types = {"top_k": jnp.int32, "seed": jnp.uint32, "stream": jnp.uint32}
    merged = neutral | values
    return Knobs(*(jnp.broadcast_to(jnp.array(v, types.get(k, jnp.float32)), (rows,)) for k, v in merged.items()))


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(3).normal(0, 4, (ROWS, VOCAB)).astype(np.float32)


@pytest.fixture(scope="module")
def warpers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers.generation.logits_process")


def oracle(warper, scores, ids=None):
    import torch

    return warper(None if ids is None else torch.tensor(ids), torch.tensor(np.asarray(scores))).numpy()


def same(ours, theirs):
    ours = np.asarray(ours)
    assert np.array_equal(np.isneginf(ours), np.isneginf(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 17, 299])
def test_top_k(logits, warpers, k):
    same(sampling.top_k(logits, jnp.full(ROWS, k)), oracle(warpers.TopKLogitsWarper(k), logits))


def test_top_k_keeps_ties_as_transformers_does(warpers):
    tied = np.array([[1.0, 3.0, 2.0, 2.0, -1.0, 2.0]], np.float32)
    same(sampling.top_k(tied, jnp.array([2])), oracle(warpers.TopKLogitsWarper(2), tied))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(logits, warpers, p):
    same(sampling.top_p(logits, jnp.full(ROWS, p)), oracle(warpers.TopPLogitsWarper(p), logits))


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5])
def test_min_p(logits, warpers, p):
    same(sampling.min_p(logits, jnp.full(ROWS, p)), oracle(warpers.MinPLogitsWarper(p), logits))


def test_temperature_and_repetition_penalty(logits, warpers):
    ids = np.random.default_rng(4).integers(0, VOCAB, (ROWS, 40))
    seen = np.zeros((ROWS, VOCAB), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    same(
        sampling.repetition_penalty(logits, seen, jnp.full(ROWS, 1.3)),
        oracle(warpers.RepetitionPenaltyLogitsProcessor(1.3), logits, ids),
    )
    same(sampling.temperature(logits, jnp.full(ROWS, 0.7)), oracle(warpers.TemperatureLogitsWarper(0.7), logits))


def test_the_whole_chain_has_transformers_order(logits, warpers):
    scores = logits
    for warper in (
        warpers.TemperatureLogitsWarper(1.7),
        warpers.TopKLogitsWarper(40),
        warpers.TopPLogitsWarper(0.8),
        warpers.MinPLogitsWarper(0.02),
    ):
        scores = oracle(warper, scores)
    same(sampling.filter_scores(logits, knobs(temperature=1.7, top_k=40, top_p=0.8, min_p=0.02)), scores)


def test_rows_keep_their_own_settings(logits):
    mixed = knobs(
        temperature=[0.5, 1.0, 1.0, 1.0, 2.0],
        top_k=[10**6, 3, 10**6, 10**6, 9],
        top_p=[1, 1, 0.6, 1, 1],
        min_p=[0, 0, 0, 0.1, 0],
    )
    together = sampling.filter_scores(logits, mixed)
    for row in range(ROWS):
        alone = sampling.filter_scores(logits, Knobs(*(jnp.broadcast_to(x[row], (ROWS,)) for x in mixed)))
        np.testing.assert_array_equal(together[row], alone[row])
    assert np.isfinite(together[0]).all(), "nothing is cut where no filter is set"


def test_greedy_takes_the_likeliest_after_the_penalty():
    logits = jnp.array([[1.0, 3.0, 2.9], [1.0, 3.0, 2.9]])
    seen = jnp.array([[False, True, False]] * 2)
    chosen, logprobs = sampling.choose(logits, seen, knobs(2, penalty=[1.0, 1.1]), jnp.zeros(2, jnp.int32))
    assert chosen.tolist() == [1, 2]
    expected = jax.nn.log_softmax(logits[0])[jnp.array([1, 2])]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-6)


def test_drawn_frequencies_follow_the_probabilities():
    draws = 4000
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), (draws, 4))
    settings = knobs(draws, temperature=1.0, top_k=3, stream=np.arange(draws))
    chosen, logprobs = sampling.choose(logits, jnp.zeros((draws, 4), bool), settings, jnp.zeros(draws, jnp.int32))
    shares = np.bincount(chosen, minlength=4) / draws
    # Four standard deviations of a share of one half.
    np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=4 * 0.5 / draws**0.5)
    np.testing.assert_allclose(logprobs[0], logits[0, chosen[0]], rtol=1e-5)


def test_draws_depend_on_seed_stream_and_position_only(logits):
    seen, rows = np.zeros((ROWS, VOCAB), bool), np.arange(ROWS)

    def choose(order):
        settings = knobs(temperature=1.5, seed=rows[order], stream=rows[order] + 2)
        return np.asarray(sampling.choose(logits[order], seen, settings, jnp.array(rows[order] + 7))[0])

    np.testing.assert_array_equal(choose(rows[::-1])[::-1], choose(rows))
    flat, count = np.zeros((64, VOCAB), np.float32), np.arange(64)
    for varied in ({"seed": count}, {"stream": count}, {}):
        positions = jnp.array(count if not varied else 0 * count)
        drawn = sampling.draw(flat, knobs(64, temperature=1.0, **varied), positions)
        assert len(set(drawn.tolist())) > 32
