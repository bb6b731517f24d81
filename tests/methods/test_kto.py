"""The KTO losses against what TRL computed, and their properties: packing, micro-batches, one estimate for a batch."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles.kto_cases import CASES, answers, rows_of, settings_of
from oracles.tiny_model import RECORDED, write_folder

from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.load import load_model
from jaxft.config import load
from jaxft.data.batch import Example, assemble
from jaxft.data.formats import DESIRABLE
from jaxft.methods import kto
from jaxft.methods.kto import KTOBatch
from jaxft.objectives.kto import kto_terms
from jaxft.objectives.loss import MethodState, with_batch_sums
from jaxft.training.state import TrainState
from jaxft.training.step import make_train_step

MOVED = 0.3  # as in record_kto.py
RECORDS = Path(__file__).parents[1] / "oracles" / "kto.npz"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(policy, reference): the models that were recorded."""
    folder = tmp_path_factory.mktemp("models")
    return tuple(load_model(write_folder(folder / name, moved)).module for name, moved in (("a", MOVED), ("b", 0.0)))


def document(prompt, answer, values=None):
    tokens = np.concatenate([prompt, answer]).astype(np.int32)
    mask = (np.arange(len(tokens)) >= len(prompt)).astype(np.uint8)
    return Example(tokens=tokens, mask=mask, row=0, values=values or {})


def batch_of(rows, places, length=64, mismatched=True):
    """A batch of (prompt, answer, label) rows. places: the rows of each sequence, by index."""
    own = [document(prompt, answer, {DESIRABLE: (float(label),)}) for prompt, answer, label in rows]
    # As in TRL's batches.
    others = [document(prompt, rows[index - 1][1]) for index, (prompt, _, _) in enumerate(rows)]
    out = assemble([[own[i] for i in place] for place in places], length, like=own[0])
    other = assemble([[others[i] for i in place] for place in places], length) if mismatched else None
    return jax.tree.map(jnp.asarray, KTOBatch(out, other))


def config_of(**fields):
    overrides = {"method.name": "kto", "adapter.kind": "none", "eval.metric": None}
    return load("configs/quickstart.py:smoke", overrides | {f"method.kto.{key}": x for key, x in fields.items()})


def value_and_grad(models, batch, **fields):
    """(means of loss and metrics, gradient by the parameters of the policy)."""
    policy, reference = models
    config, (graphdef, arrays) = config_of(**fields), nnx.split(policy)
    loss, sums_of = kto.loss(config, policy), kto.batch_sums(config, policy)
    state = MethodState(rebuilt=nnx.state(reference))

    def total(arrays):
        model = nnx.merge(graphdef, arrays)
        sums = loss(model, batch, None, with_batch_sums(state, sums_of(model, batch, state)))
        return sums.total / sums.weight, sums

    (_, sums), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(arrays)
    return {name: float(value) for name, value in sums.means().items()}, nnx.merge(graphdef, gradient)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_losses_gradients_and_metrics_are_those_of_trl(models, case):
    """Loss and metrics within 1e-4 of themselves, gradients within 1e-4 of the tensor's largest, in float32."""
    file, rows, fields = np.load(RECORDS), rows_of(case), settings_of(case)
    estimates = fields.get("loss_type", "kto") == "kto"
    places = [[index] for index in range(len(rows))]
    means, gradient = value_and_grad(models, batch_of(rows, places, 16, mismatched=estimates), **fields)
    expected = json.loads(str(file[f"{case}/values"]))
    assert str(file["trl_version"]).startswith("1.16") and ("kl" in means) == estimates
    compared = set(means) & set(expected)
    assert {"loss", "rewards/chosen", "logps/chosen"} <= compared
    for name in compared:
        assert means[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    good = sum(label for _, _, label in rows)
    assert (means["count/chosen"], means["count/rejected"]) == (good, len(rows) - good)
    tensors = {name: np.asarray(make()) for name, (_, make) in hf_tensors(gradient).items()}
    flat = file[f"{case}/gradients"]
    for name in RECORDED:
        size = tensors[name].size
        theirs, flat = flat[:size].reshape(tensors[name].shape), flat[size:]
        tolerance = 1e-4 * np.abs(theirs).max()
        np.testing.assert_allclose(tensors[name], theirs, rtol=0, atol=tolerance, err_msg=name)


def test_packed_answers_equal_answers_alone(models):
    rows = answers()
    alone, gradient = value_and_grad(models, batch_of(rows, [[0], [1], [2], [3], [4]], 16), beta=0.3)
    packed, other = value_and_grad(models, batch_of(rows, [[3, 1, 0], [], [2, 4]]), beta=0.3)
    assert packed == pytest.approx(alone, rel=1e-5) and packed["kl"] > 0.5
    for a, b in zip(jax.tree.leaves(nnx.state(other)), jax.tree.leaves(nnx.state(gradient)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(b))))


def test_four_micro_batches_equal_one(models):
    """The estimate of the divergence is that of the whole batch, and a micro-batch may lack a class, or any answer."""
    policy, reference = models
    config, batch = config_of(beta=0.3, undesirable_weight=1.5), batch_of(answers(), [[0, 1], [2], [4, 3], []], 32)
    graphdef, arrays = nnx.split(policy)
    state = TrainState(
        step=jnp.int32(0), trainable=arrays, frozen=nnx.State({}), opt_state=optax.sgd(1.0).init(arrays),
        key=jax.random.key(0), method=MethodState(rebuilt=nnx.state(reference)),
    )  # fmt: skip
    make = partial(
        make_train_step, graphdef, kto.loss(config, policy), optax.sgd(1.0), lambda step: 1.0,
        batch_sums=kto.batch_sums(config, policy),
    )  # fmt: skip
    (one, metrics), (other, others) = (jax.jit(make(accumulation_steps=n))(state, batch) for n in (1, 4))
    assert {k: float(v) for k, v in others.items()} == pytest.approx({k: float(v) for k, v in metrics.items()}, 1e-5)
    assert metrics["kl"] > 0.5 and metrics["count/chosen"] == 3 and one.method.batch is None
    for a, b in zip(jax.tree.leaves(other.trainable), jax.tree.leaves(one.trainable), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_policy_that_is_its_reference_has_a_loss_of_one_half_and_no_divergence(models):
    _, reference = models
    means, _ = value_and_grad((reference, reference), batch_of(answers(), [[0, 1, 2], [3, 4]]), beta=0.3)
    assert means["loss"] == pytest.approx(0.5, abs=1e-6) and means["kl"] == pytest.approx(0, abs=1e-5)
    assert all(abs(means[f"rewards/{name}"]) < 1e-5 for name in ("chosen", "rejected", "margins"))


def test_terms_by_hand():
    ratio, good, kl = jnp.array([2.0, -1.0, 2.0, -1.0]), jnp.array([1.0, 1.0, 0.0, 0.0]), jnp.float32(0.5)
    s = lambda x: 1 / (1 + np.exp(-np.asarray(x)))  # noqa: E731
    terms = kto_terms(ratio, good, kl, beta=0.4, loss_type="kto")
    np.testing.assert_allclose(terms, [1 - s(0.6), 1 - s(-0.6), 1 - s(-0.6), 1 - s(0.6)], rtol=1e-6)
    terms = kto_terms(ratio, good, kl, beta=0.4, loss_type="apo_zero_unpaired")
    np.testing.assert_allclose(terms, [1 - s(0.8), 1 - s(-0.4), s(0.8), s(-0.4)], rtol=1e-6)
