"""The reward loss against what TRL's RewardTrainer computed, and its properties.

`tests/oracles/record_reward.py` recorded the values, in float32.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.load import load_model
from jaxft.data.batch import Example, assemble
from jaxft.errors import ModelError
from jaxft.objectives.pairs import Pairs
from jaxft.objectives.reward import document_scores, reward_loss, reward_terms

RECORDED = np.load(Path(__file__).parents[1] / "oracles" / "reward.npz")
VARIANTS = {
    "plain": {},
    "margins": {"margins": True},
    "centred": {"center": 0.01},
    "both": {"margins": True, "center": 0.3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The recorded LlamaForSequenceClassification."""
    folder = tmp_path_factory.mktemp("reward")
    (folder / "config.json").write_text(str(RECORDED["config"]))
    weights = {name.removeprefix("weights/"): RECORDED[name] for name in RECORDED if name.startswith("weights/")}
    save_file(weights, folder / "model.safetensors")
    return load_model(str(folder)).module


def pairs(margins):
    """Each pair's two documents."""
    out = []
    for row, (chosen, rejected, prompt) in enumerate(json.loads(str(RECORDED["pairs"]))):
        values = {"margin": (float(RECORDED["margins"][row]),)} if margins else {}
        documents = [
            Example(
                tokens=np.array(ids, np.int32), mask=np.uint8(np.arange(len(ids)) >= prompt), row=row, values=values
            )
            for ids in (chosen, rejected)
        ]
        out.append(documents)
    return out


def batch_of(rows, length):
    like = next(iter(rows))[0][0]
    return jax.tree.map(jnp.asarray, assemble([[d for pair in row for d in pair] for row in rows], length, like=like))


def value_and_grad(model, batch, center=None):
    graphdef, state = nnx.split(model)

    def total(state):
        sums = reward_loss(nnx.merge(graphdef, state), batch, None, center_rewards_coefficient=center)
        return sums.total / sums.weight, sums

    (loss, sums), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(state)
    return float(loss), sums, grads


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradients_and_metrics_are_those_of_trl(model, variant):
    settings = VARIANTS[variant]
    packed = batch_of([pairs(settings.get("margins", False))], 96)
    loss, sums, grads = value_and_grad(model, packed, settings.get("center"))
    assert loss == pytest.approx(float(RECORDED[f"{variant}/loss"]), rel=1e-5)
    means = {name: float(value) for name, value in sums.means().items()}
    assert set(means) == {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"}
    for name in set(means) - {"loss"}:
        assert means[name] == pytest.approx(float(RECORDED[f"{variant}/{name}"]), rel=1e-4, abs=1e-5), name
    tensors = hf_tensors(nnx.merge(nnx.split(model)[0], grads))
    recorded = [name for name in RECORDED if name.startswith(f"{variant}/gradient/")]
    assert len(recorded) == 3
    for name in recorded:
        expected = RECORDED[name]
        actual = tensors[name.removeprefix(f"{variant}/gradient/")][1]()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_packed_pairs_equal_pairs_alone(model):
    """A row without a pair counts nothing."""
    alone = value_and_grad(model, batch_of([[pair] for pair in pairs(True)], 32), 0.3)
    packed = value_and_grad(model, batch_of([pairs(True), []], 96), 0.3)
    assert packed[0] == pytest.approx(alone[0], rel=1e-6)
    assert float(packed[1].weight) == 4 and float(packed[1].trained_tokens) == 8
    for a, b in zip(jax.tree.leaves(packed[2]), jax.tree.leaves(alone[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(b))))


def test_scores_are_read_by_place(model):
    """Whatever the last token is: also one that pads elsewhere."""
    document = np.array([5, 9, 0, 7, 0], np.int32)
    batch = batch_of([[[Example(tokens=document, mask=np.ones(5, np.uint8), row=0)] * 2]], 16)
    scores = np.asarray(document_scores(model, batch))
    hidden_BSD, _ = model(document[None])
    assert scores[0, 0] == pytest.approx(float(model.value(hidden_BSD)[0, -1]), rel=1e-5)
    assert scores[0, 1] == pytest.approx(scores[0, 0], rel=1e-5) and not scores[0, 2:].any()


def test_a_batch_without_a_pair_is_finite(model):
    sums = reward_loss(model, batch_of([pairs(False)], 96)._replace(segments_BS=jnp.zeros((1, 96), jnp.int32)), None)
    assert float(sums.weight) == 0
    assert all(np.isfinite(float(value.total)) for value in sums.metrics.values())


def test_the_terms_by_hand():
    scores = Pairs(jnp.array([[1.0, -0.5]]), jnp.array([[0.25, 2.0]]))
    terms = reward_terms(scores, jnp.array([[0.5, 0.0]]), 0.1)
    expected = [math.log1p(math.exp(-0.25)) + 0.1 * 1.25**2, math.log1p(math.exp(2.5)) + 0.1 * 1.5**2]
    np.testing.assert_allclose(terms[0], expected, rtol=1e-6)


def test_a_reward_model_has_no_logits_and_a_language_model_no_scores(model, tiny_llama):
    with pytest.raises(ModelError, match="this is a reward model: it has a score head in place of the LM head"):
        model.unembed(jnp.zeros((1, 1, 16)))
    with pytest.raises(ModelError, match="the model has no score head"):
        load_model(tiny_llama("tied")).scores([[1, 2, 3]])
