"""Losses on pairs of answers against what TRL computed, and their properties: packing, micro-batches, one pair."""

import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles.pair_cases import ALL, CASES, settings
from oracles.tiny_model import RECORDED, pairs, write_folder

from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.load import load_model
from jaxft.config import load
from jaxft.data.batch import Example, assemble
from jaxft.methods import method_of
from jaxft.methods.dpo import logps_of
from jaxft.methods.parts.reference import REFERENCE_LOGPS
from jaxft.objectives.loss import MethodState, with_batch_sums
from jaxft.objectives.pair_losses import PAIR_LOSSES, PairSettings, divergence_scores, odds_ratio
from jaxft.objectives.pairs import Pairs, answer_sums, existing_pairs
from jaxft.training.state import TrainState
from jaxft.training.step import make_train_step

MOVED = 0.3  # as in record_pairs.py
ORACLES = Path(__file__).parents[1] / "oracles"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(policy, reference): the models that were recorded."""
    folder = tmp_path_factory.mktemp("models")
    return tuple(load_model(write_folder(folder / name, moved)).module for name, moved in (("a", MOVED), ("b", 0.0)))


@pytest.fixture(scope="module")
def recorded():
    return {name: np.load(ORACLES / f"{name}.npz") for name in ("dpo", "reference_free")}


def documents(pair, row=0):
    prompt, *answers = pair
    out = []
    for answer in answers:
        tokens = np.concatenate([prompt, answer]).astype(np.int32)
        mask = (np.arange(len(tokens)) >= len(prompt)).astype(np.uint8)
        out.append(Example(tokens=tokens, mask=mask, row=row))
    return out


def batch_of(rows, length=64):
    """Rows of pairs, packed."""
    return jax.tree.map(jnp.asarray, assemble([[d for pair in row for d in documents(pair)] for row in rows], length))


def config_of(method, **fields):
    overrides = {"method.name": method, "adapter.kind": "none", "eval.metric": None}
    return load("configs/quickstart.py:smoke", overrides | {f"method.{method}.{key}": x for key, x in fields.items()})


def value_and_grad(models, batch, method, **fields):
    """(means of loss and metrics, gradient) of a method's loss by the parameters of the policy."""
    policy, reference = models
    config = config_of(method, **fields)
    parts, (graphdef, arrays) = method_of(config), nnx.split(policy)
    loss, sums_of = parts.loss(config, policy), parts.batch_sums(config, policy)
    state = MethodState(rebuilt=nnx.state(reference)) if method == "dpo" else None

    def total(arrays):
        model = nnx.merge(graphdef, arrays)
        whole = None if sums_of is None else sums_of(model, batch, state)
        sums = loss(model, batch, None, with_batch_sums(state, whole))
        return sums.total / sums.weight, sums

    (_, sums), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(arrays)
    return {name: float(value) for name, value in sums.means().items()}, nnx.merge(graphdef, gradient)


def tensors_of(gradient):
    return {name: np.asarray(make()) for name, (_, make) in hf_tensors(gradient).items()}


@pytest.mark.parametrize(("method", "case"), ALL, ids=lambda value: value.replace(" ", "-"))
def test_losses_gradients_and_metrics_are_those_of_trl(models, recorded, method, case):
    """Loss and metrics within 1e-4 of themselves, gradients within 1e-4 of the tensor's largest, in float32."""
    fields, file = dict(settings(method, case)), recorded["dpo" if method == "dpo" else "reference_free"]
    one = fields.pop("pair", None)
    rows = [pairs()[:2], pairs()[2:]] if one is None else [[pairs()[one]]]
    means, gradient = value_and_grad(models, batch_of(rows), method, **fields)
    expected = json.loads(str(file[f"{method}/{case}/values"]))
    assert str(file["trl_version"]).startswith("1.16") and {"rewards/margins", "logps/chosen"} <= set(means)
    for name in set(means) - {"nll_loss"} | set(means) & set(expected):  # TRL's DPO reports no negative log-likelihood
        assert means[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    flat, tensors = file[f"{method}/{case}/gradients"], tensors_of(gradient)
    for name in RECORDED:
        size = tensors[name].size
        theirs, flat = flat[:size].reshape(tensors[name].shape), flat[size:]
        tolerance = 1e-4 * np.abs(theirs).max()
        np.testing.assert_allclose(tensors[name], theirs, rtol=0, atol=tolerance, err_msg=name)


# Losses that add other units than pairs, or look at the lengths within a pair.
MIXED = [
    ("dpo", {"loss_type": "sigmoid,ipo", "sft_weight": 0.5, "label_smoothing": 0.1}),
    ("dpo", {"ld_alpha": 0.3, "use_weighting": True}),
    ("orpo", {"nll_on_prompt": True}),
    ("cpo", {"label_smoothing": 0.1}),
    ("simpo", {}),
]
by_mixed = pytest.mark.parametrize(("method", "fields"), MIXED, ids=[f"{m}{i}" for i, (m, _) in enumerate(MIXED)])


@by_mixed
def test_packed_pairs_equal_pairs_alone(models, method, fields):
    alone, gradient = value_and_grad(models, batch_of([[pair] for pair in pairs()]), method, **fields)
    packed, other = value_and_grad(models, batch_of([pairs(), []], 80), method, **fields)
    assert packed == pytest.approx(alone, rel=1e-5)
    for a, b in zip(jax.tree.leaves(nnx.state(other)), jax.tree.leaves(nnx.state(gradient)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@by_mixed
def test_four_micro_batches_equal_one(models, method, fields):
    """Three pairs in four micro-batches: one of these has none."""
    policy, reference = models
    config, rows = config_of(method, **fields), batch_of([[pair] for pair in pairs()] + [[]])
    parts, (graphdef, arrays) = method_of(config), nnx.split(policy)
    state = TrainState(
        step=jnp.int32(0), trainable=arrays, frozen=nnx.State({}), opt_state=optax.sgd(1.0).init(arrays),
        key=jax.random.key(0), method=MethodState(rebuilt=nnx.state(reference)) if method == "dpo" else None,
    )  # fmt: skip
    make = partial(
        make_train_step, graphdef, parts.loss(config, policy), optax.sgd(1.0), lambda step: 1.0,
        batch_sums=parts.batch_sums(config, policy),
    )  # fmt: skip
    (one, metrics), (other, others) = (jax.jit(make(accumulation_steps=n))(state, rows) for n in (1, 4))
    assert {k: float(v) for k, v in others.items()} == pytest.approx({k: float(v) for k, v in metrics.items()}, 1e-5)
    for a, b in zip(jax.tree.leaves(other.trainable), jax.tree.leaves(one.trainable), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_policy_that_is_its_reference_has_ln_2(models):
    """The passes with and without gradients are compiled separately, so the last bits of log-probabilities differ."""
    _, reference = models
    means, _ = value_and_grad((reference, reference), batch_of([pairs()], 80), "dpo", beta=0.3)
    assert means["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(abs(means[f"rewards/{name}"]) < 1e-5 for name in ("chosen", "rejected", "margins"))


def test_reference_sums_that_the_batch_carries_take_the_place_of_the_reference(models):
    """Answers of a reference that was asked before training, in `Batch.values`."""
    policy, reference = models
    batch = batch_of([pairs()[:2], pairs()[2:]])
    config = config_of("dpo", ld_alpha=0.4)
    cached = batch._replace(values={REFERENCE_LOGPS: jax.jit(logps_of(config))(reference, batch)})
    expected, _ = value_and_grad(models, batch, "dpo", ld_alpha=0.4)
    means, _ = value_and_grad((policy, policy), cached, "dpo", ld_alpha=0.4)
    assert means == pytest.approx(expected, rel=1e-5)


def test_formulas_by_hand():
    scores, lengths = (
        Pairs(np.float32([2.0, -3.0]), np.float32([1.0, 0.5])),
        Pairs(np.float32([4, 2]), np.float32([2, 5])),
    )
    margins, settings = np.array([1.0, -3.5]), PairSettings(beta=0.5, label_smoothing=0.2)
    s = lambda x: 1 / (1 + np.exp(-np.asarray(x)))  # noqa: E731
    right, wrong = np.log(s(0.5 * margins)), np.log(s(-0.5 * margins))
    np.testing.assert_allclose(PAIR_LOSSES["sigmoid"](scores, lengths, settings), -0.8 * right - 0.2 * wrong, 1e-5)
    robust = (-0.8 * right + 0.2 * wrong) / 0.6
    np.testing.assert_allclose(PAIR_LOSSES["robust"](scores, lengths, settings), robust, 1e-5)
    np.testing.assert_allclose(PAIR_LOSSES["ipo"](scores, lengths, settings), [(0.5 - 0.5 - 1) ** 2, 2.6**2], 1e-5)
    means = Pairs(np.float32([-0.3, -1.0]), np.float32([-2.0, -0.5]))
    odds = [np.log(np.exp(x) / (1 - np.exp(x))) for x in means]
    np.testing.assert_allclose(odds_ratio(means)[0], odds[0] - odds[1], 1e-5)


def test_divergences_have_the_log_ratio_s_slope_where_policy_and_reference_agree():
    """f''(1) is 1 for the KL divergences and the alpha-divergence, 1/2 for Jensen and Shannon's."""
    slope = jax.grad(lambda x, name: divergence_scores(Pairs(x, x), name, 0.5).chosen)
    slopes = {
        name: float(slope(0.0, name)) for name in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    }
    assert slopes == pytest.approx(
        {"reverse_kl": 1.0, "forward_kl": 1.0, "js_divergence": 0.5, "alpha_divergence": 1.0}
    )


def test_odds_are_finite_if_an_answer_is_certain_or_missing():
    means = jnp.array([0.0, -1e-9, -80.0])
    odds = lambda x, y: jnp.sum(odds_ratio(Pairs(x, y))[1])  # noqa: E731
    value, gradients = jax.value_and_grad(odds, argnums=(0, 1))(means, means[::-1])
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in gradients)


def test_tokens_beyond_the_shorter_answer_count_by_ld_alpha():
    """Prompt of 2; answers of 2 and 4 tokens, then of 3 and 1, in one row."""
    answers = [(np.arange(2), np.arange(a), np.arange(b)) for a, b in ((2, 4), (3, 1))]
    batch = batch_of([answers, []], 32)
    np.testing.assert_allclose(answer_sums(batch.weights_BS, batch, 0.25)[0, :5], [2, 2.5, 1.5, 1, 0])
    np.testing.assert_allclose(answer_sums(batch.weights_BS, batch)[0, :5], [2, 4, 3, 1, 0])
    assert existing_pairs(batch.segments_BS).sum(axis=1).tolist() == [2, 0]


def test_every_loss_of_dpo_is_compared_with_trl():
    compared = {name for case in CASES["dpo"].values() for name in case.get("loss_type", "sigmoid").split(",")}
    assert compared - {"sft"} == set(PAIR_LOSSES)
