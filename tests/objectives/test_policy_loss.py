"""The policy loss: TRL's values and gradients, and the same whatever a batch is cut, packed or distributed like.

`tests/oracles/record_policy.py` recorded what TRL 1.16 computed, in float32.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles.policy_cases import (
    CASES,
    CUT_OFF,
    RLOO_CASES,
    advantages,
    answers,
    sampler_differences,
    settings_of,
)
from oracles.tiny_model import RECORDED, write_folder

from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.load import load_model
from jaxft.config import MeshConfig
from jaxft.data.batch import Example, assemble
from jaxft.nn.storage import storage_dims_of
from jaxft.objectives.documents import target_statistics
from jaxft.objectives.policy.denominators import TRUNCATED, UNITS, policy_counts, without_truncated
from jaxft.objectives.policy.loss import (
    ADVANTAGES,
    OLD_LOGPS,
    REFERENCE_LOGPS,
    SAMPLER_LOGPS,
    policy_logps,
    policy_loss,
    policy_sums,
)
from jaxft.objectives.policy.surrogate import PolicySettings, kl_terms, rloo_settings
from jaxft.objectives.sft import sft_loss
from jaxft.objectives.token_loss import TokenStatistics
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.training.state import TrainState
from jaxft.training.step import make_train_step

MOVED = 0.3  # as in record_policy.py
RECORDS = np.load(Path(__file__).parents[1] / "oracles" / "policy.npz")
PACKED = [[0, 3], [4, 1], [2, 5]]
# The policy, the old one, the reference and the sampler all differ; one term is over answers and the other over tokens.
EVERYTHING = PolicySettings(
    loss_type="grpo", epsilon=0.1, beta=0.2, importance_cap=1.3, entropy_coef=0.1, mask_truncated_completions=True
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The policy that was recorded."""
    return load_model(write_folder(tmp_path_factory.mktemp("policy"), MOVED)).module


@pytest.fixture(scope="module")
def pullback(model):
    """The statistics of a batch, and their gradient: programs that the cases share."""
    graphdef, _ = nnx.split(model)

    @partial(jax.jit, static_argnums=2)
    def statistics_and_gradient(arrays, batch, temperature, cotangents):
        def statistics(arrays):
            policy = nnx.merge(graphdef, arrays)
            hidden_BSD, _ = policy(batch.tokens_BS, batch.positions_BS, batch.segments_BS)
            return target_statistics(policy, hidden_BSD, batch, temperature=temperature, entropy_gradient=True)

        values, pull = jax.vjp(statistics, arrays)
        return values, pull(cotangents)[0]

    def call(batch, temperature, cotangents=None):
        cotangents = [jnp.zeros(batch.tokens_BS.shape)] * 3 if cotangents is None else cotangents
        return statistics_and_gradient(nnx.state(model), batch, temperature, TokenStatistics(*cotangents))

    return call


def batch_of(rows, places, length=32, *, values=None, arrays=None):
    """A batch of (prompt, answer, mask) rows. values, arrays: by name, of each row, [n] and [n, tokens]."""
    values, arrays, documents = values or {}, arrays or {}, []
    for index, (prompt, answer, mask) in enumerate(rows):
        own = {n: np.r_[np.zeros(len(prompt)), x[index][: len(answer)]].astype(np.float32) for n, x in arrays.items()}
        documents.append(
            Example(
                tokens=np.r_[prompt, answer].astype(np.int32), mask=np.r_[0 * prompt, mask].astype(np.uint8), row=index,
                values={name: (float(x[index]),) for name, x in values.items()}, arrays=own,
            )
        )  # fmt: skip
    return jax.tree.map(
        jnp.asarray, assemble([[documents[i] for i in place] for place in places], length, like=documents[0])
    )


def recorded_batch(case, places=PACKED, rows=None):
    """The batch of a case, with everything that its loss can read."""
    arrays = {}
    if not CASES.get(case, {}).get("on_policy"):
        arrays[OLD_LOGPS] = RECORDS[f"{case}/old"]
    if f"{case}/reference" in RECORDS:
        arrays[REFERENCE_LOGPS] = RECORDS[f"{case}/reference"]
    if CASES.get(case, {}).get("importance_cap"):
        arrays[SAMPLER_LOGPS] = arrays[OLD_LOGPS] + sampler_differences()
    if CASES.get(case, {}).get("by_token"):
        arrays[ADVANTAGES] = advantages()[1]
    values = {ADVANTAGES: advantages()[0], TRUNCATED: np.arange(6) == CUT_OFF}
    return batch_of(answers() if rows is None else rows, places, values=values, arrays=arrays)


def everything(places):
    """The batch of EVERYTHING."""
    old = RECORDS["k3/old"]
    arrays = {OLD_LOGPS: old, REFERENCE_LOGPS: RECORDS["k3/reference"], SAMPLER_LOGPS: old + sampler_differences()}
    values = {ADVANTAGES: advantages()[0], TRUNCATED: np.arange(6) == CUT_OFF}
    return batch_of(answers(), places, values=values, arrays=arrays)


def assert_gradients_are(model, gradient, flat, message):
    """Within 1e-4 of the largest number of each recorded tensor."""
    tensors = {name: make for name, (_, make) in hf_tensors(nnx.merge(nnx.split(model)[0], gradient)).items()}
    for name in RECORDED:
        ours = np.asarray(tensors[name]())
        theirs, flat = flat[: ours.size].reshape(ours.shape), flat[ours.size :]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max(), err_msg=f"{message}: {name}")


@pytest.mark.parametrize("case", [*CASES, *RLOO_CASES], ids=lambda case: case.replace(" ", "-"))
def test_losses_gradients_and_metrics_are_those_of_trl(model, pullback, case):
    """Loss and metrics within 1e-5, or 1e-4 of themselves, gradients within 1e-4 of the tensor's largest number."""
    rows = answers()
    if case in RLOO_CASES:
        settings = rloo_settings(**RLOO_CASES[case])
        rows = [(prompt, answer, 0 * mask + 1) for prompt, answer, mask in rows]  # TRL's RLOO knows no tools
    else:
        settings = PolicySettings(**settings_of(case))
    batch = recorded_batch(case, rows=rows)
    expected = json.loads(str(RECORDS[f"{case}/values"]))
    assert str(RECORDS["trl_version"]).startswith("1.16")
    inputs = without_truncated(batch, settings)
    statistics, _ = pullback(inputs, settings.temperature)

    def loss(statistics):
        sums = policy_sums(statistics, batch, settings)
        return sums.total / sums.weight, sums

    (value, sums), cotangents = jax.value_and_grad(loss, has_aux=True)(statistics)
    means = {name: float(x) for name, x in sums.means().items()}
    assert means["loss"] == float(value)
    compared = set(means) & set(expected)
    assert len(compared) == len(expected) - ("clip_ratio/low_min" in expected) * 2 - ("policy_loss" in expected) * 2
    for name in compared:
        assert means[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    _, gradient = pullback(inputs, settings.temperature, cotangents)
    assert_gradients_are(model, gradient, RECORDS[f"{case}/gradients"], case)


def test_the_sampler_is_compared_with_the_trainer(pullback):
    settings = PolicySettings(**settings_of("importance"))
    batch = recorded_batch("importance")
    means = policy_sums(pullback(batch, 1.0)[0], batch, settings).means()
    mask = np.array([np.r_[mask, np.zeros(8 - len(mask))] for _, _, mask in answers()]) > 0
    difference = sampler_differences()[mask]
    assert float(means["sampling/sampling_logp_difference/mean"]) == pytest.approx(np.abs(difference).mean(), rel=1e-4)
    assert float(means["sampling/sampling_logp_difference/max"]) == pytest.approx(np.abs(difference).max(), rel=1e-4)
    ratio = np.minimum(np.exp(-difference), 1.3)
    assert float(means["sampling/importance_sampling_ratio/mean"]) == pytest.approx(ratio.mean(), rel=1e-4)


def value_and_grad(model, batch, settings):
    """(means of loss and metrics, gradient of the loss), by `policy_loss`."""
    graphdef, arrays = nnx.split(model)

    def total(arrays, batch):
        sums = policy_loss(nnx.merge(graphdef, arrays), batch, None, settings)
        return sums.total / sums.weight, sums

    (_, sums), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(arrays, batch)
    return {name: float(value) for name, value in sums.means().items()}, gradient


def assert_close(a, b, share=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=share * float(jnp.max(jnp.abs(y))))


def test_packed_answers_equal_answers_alone(model):
    """Empty rows count nothing, and the answers to one prompt may be in any rows."""
    alone, gradient = value_and_grad(model, everything([[0], [1], [2], [3], [4], [5]]), EVERYTHING)
    packed, other = value_and_grad(model, everything([[5, 3], [], [0, 4], [1, 2]]), EVERYTHING)
    assert packed == pytest.approx(alone, rel=1e-5) and packed["kl"] > 0.1
    assert_close(other, gradient)


def test_the_first_step_is_that_of_a_cross_entropy_weighted_by_advantages(model):
    settings, batch = PolicySettings(loss_type="dapo"), recorded_batch("first step")
    _, gradient = value_and_grad(model, batch, settings)
    graphdef, arrays = nnx.split(model)
    weights_BS = batch.weights_BS * jnp.take_along_axis(
        jnp.pad(batch.values[ADVANTAGES], ((0, 0), (1, 0))), batch.segments_BS, axis=1
    )

    def cross_entropy(arrays):
        weighted = batch._replace(weights_BS=weights_BS)
        return sft_loss(nnx.merge(graphdef, arrays), weighted, None).total / jnp.sum(batch.weights_BS)

    assert_close(gradient, jax.jit(jax.grad(cross_entropy))(arrays))


@pytest.fixture(scope="module")
def steps(model):
    """The state that steps of SGD start from; a step, the same compiled, and one in four micro-batches."""
    graphdef, arrays = nnx.split(model)
    tx = optax.sgd(1.0, momentum=0.9)
    state = TrainState(jnp.int32(0), arrays, nnx.State({}), tx.init(arrays), jax.random.key(0))

    def loss(model, batch, key, state):
        return policy_loss(model, batch, key, EVERYTHING, counts=state.batch)

    def batch_sums(model, batch, state):
        return policy_counts(batch, EVERYTHING)

    make = partial(
        make_train_step, graphdef, loss, tx, lambda step: 1.0, batch_sums=batch_sums, skips_empty=True
    )  # fmt: skip
    return state, make(), jax.jit(make()), jax.jit(make(accumulation_steps=4))


# Two rows for each of four micro-batches, one of which has no answer. The answers to one prompt are in all of them.
EIGHT_ROWS = [[0], [4], [2], [], [1, 3], [], [5], []]


def test_four_micro_batches_equal_one(steps):
    state, _, one, four = steps
    batch = everything(EIGHT_ROWS)
    (whole, metrics), (cut, others) = one(state, batch), four(state, batch)
    assert {k: float(v) for k, v in others.items()} == pytest.approx({k: float(v) for k, v in metrics.items()}, 1e-5)
    assert metrics["skipped_updates"] == 0 and metrics["sampling/sampling_logp_difference/max"] > 0.5
    moved = jax.tree.map(jnp.subtract, whole.trainable, state.trainable)
    assert_close(jax.tree.map(jnp.subtract, cut.trainable, state.trainable), moved, 1e-4)


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "context": 2, "tensor": 2}], ids=str)
def test_eight_devices_equal_one(model, steps, mesh):
    state, step, compiled, _ = steps
    batch, plan = everything(EIGHT_ROWS), make_mesh_plan(MeshConfig(**mesh))
    expected, metrics = compiled(state, batch)
    on_mesh = jax.jit(plan.bind(step))
    out, others = on_mesh(plan.shard(state, storage_dims_of(model)), jax.device_put(batch, plan.batch_sharding()))
    assert {k: float(v) for k, v in others.items()} == pytest.approx({k: float(v) for k, v in metrics.items()}, 1e-5)
    moved = jax.tree.map(np.subtract, jax.device_get(expected.trainable), jax.device_get(state.trainable))
    assert_close(jax.tree.map(np.subtract, jax.device_get(out.trainable), jax.device_get(state.trainable)), moved, 1e-4)


def test_a_batch_in_which_nothing_is_trained_changes_nothing(steps):
    state, _, step, _ = steps
    batch = everything(EIGHT_ROWS)
    state, _ = step(state, batch)  # momentum would go on
    after, metrics = step(state, batch._replace(weights_BS=0 * batch.weights_BS))
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["skipped_updates"] == 1
    jax.tree.map(np.testing.assert_array_equal, after.trainable, state.trainable)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
    assert int(after.step) == int(state.step) + 1


@pytest.mark.parametrize("fields", [{}, {"loss_type": "grpo"}, {"beta": 0.1}, {"entropy_coef": 0.1}])
def test_without_advantages_only_kl_and_entropy_are_trained(pullback, fields):
    batch = everything(PACKED)
    alike = batch._replace(values=batch.values | {ADVANTAGES: 0 * batch.values[ADVANTAGES]})
    statistics, _ = pullback(alike, 1.0)
    total, cotangents = jax.value_and_grad(
        lambda statistics: policy_sums(statistics, alike, PolicySettings(**fields)).total
    )(statistics)
    sums = policy_sums(statistics, alike, PolicySettings(**fields))
    trained = "beta" in fields or "entropy_coef" in fields
    assert (total != 0) == trained and float(sums.weight) > 0
    assert float(sums.trained_tokens) == trained * float(jnp.sum(batch.weights_BS))
    assert any(bool(jnp.any(x)) for x in cotangents) == trained


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_a_batch_of_cut_off_answers_has_a_loss_of_zero(pullback, loss_type):
    settings = PolicySettings(
        loss_type=loss_type, mask_truncated_completions=True, beta=0.1, entropy_coef=0.1, max_completion_length=8
    )
    batch = everything(PACKED)
    batch = batch._replace(values=batch.values | {TRUNCATED: jnp.ones_like(batch.values[TRUNCATED])})
    statistics, _ = pullback(without_truncated(batch, settings), 1.0)
    total, slope = jax.value_and_grad(lambda s: policy_sums(s, batch, settings).total)(statistics)
    sums = policy_sums(statistics, batch, settings)
    assert float(total) == 0 and float(sums.trained_tokens) == 0 and not any(bool(jnp.any(x)) for x in slope)
    assert float(sums.weight) == {"dapo": 0, "grpo": 6, "dr_grpo": 48}[loss_type]


def test_answers_that_were_left_out_keep_their_part_of_the_denominator(pullback):
    """With beta 0, an answer without advantage need not be in the batch."""
    own = advantages()[0] * np.array([1, 1, 1, 0, 1, 0], np.float32)
    arrays = {OLD_LOGPS: RECORDS["grpo/old"]}
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        settings = PolicySettings(loss_type=loss_type, max_completion_length=8)
        whole = batch_of(answers(), PACKED, values={ADVANTAGES: own}, arrays=arrays)
        expected = policy_sums(pullback(whole, 1.0)[0], whole, settings)
        lengths = np.array([mask.sum() for _, _, mask in answers()])
        units = {"grpo": np.ones(6), "dapo": lengths, "dr_grpo": np.full(6, 8)}[loss_type].astype(np.float32)
        units[0] += units[3] + units[5]
        part = batch_of(answers(), [[0], [4, 1], [2]], values={ADVANTAGES: own, UNITS: units}, arrays=arrays)
        sums = policy_sums(pullback(part, 1.0)[0], part, settings)
        assert float(sums.weight) == float(expected.weight)
        assert float(sums.total) == pytest.approx(float(expected.total), rel=1e-5)
        assert float(sums.trained_tokens) == float(expected.trained_tokens)


def test_log_probabilities_are_those_of_the_loss(model, pullback):
    batch = everything(PACKED)
    np.testing.assert_allclose(policy_logps(model, batch), pullback(batch, 1.0)[0].logps, rtol=0, atol=1e-5)


def test_ratios_beyond_every_clip_have_finite_losses_and_no_gradients(pullback):
    batch = recorded_batch("grpo")
    batch = batch._replace(arrays={OLD_LOGPS: -400.0 * batch.weights_BS, REFERENCE_LOGPS: 0 * batch.weights_BS})
    statistics, _ = pullback(batch, 1.0)
    statistics = statistics._replace(logps=statistics.logps - 200 * batch.weights_BS)
    for level in ("token", "sequence", "answer"):
        settings = PolicySettings(beta=0.1, importance_sampling_level=level)
        value, slope = jax.value_and_grad(lambda s, settings=settings: policy_sums(s, batch, settings).total)(
            statistics
        )
        assert np.isfinite(value) and not np.any(slope.logps)


def test_estimators_of_the_divergence():
    """k1, k2 and k3 by hand; over all tokens, k1 and k3 are the divergence and k3_ratio has its gradient."""
    logits, reference = jnp.array([0.3, -1.0, 0.8, 0.1]), jax.nn.log_softmax(jnp.array([1.0, 0.2, -0.5, 0.4]))

    def expected(estimator, logits):
        logps = jax.nn.log_softmax(logits)
        old = jax.lax.stop_gradient(logps)
        return jnp.sum(jnp.exp(old) * kl_terms(logps, reference, jnp.exp(logps - old), estimator))

    def divergence(logits):
        logps = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logps) * (logps - reference))

    for estimator in ("k1", "k3", "k3_ratio"):
        assert float(expected(estimator, logits)) == pytest.approx(float(divergence(logits)), rel=1e-5)
    gradients = {name: jax.grad(partial(expected, name))(logits) for name in ("k1", "k2", "k3", "k3_ratio")}
    of_divergence = jax.grad(divergence)(logits)
    np.testing.assert_allclose(gradients["k3_ratio"], of_divergence, atol=1e-6)
    np.testing.assert_allclose(gradients["k2"], of_divergence, atol=1e-6)
    np.testing.assert_allclose(gradients["k1"], 0, atol=1e-6)
    assert np.abs(gradients["k3"] - of_divergence).max() > 0.05
    assert float(kl_terms(jnp.float32(-1.0), jnp.float32(-3.0), 1.0, "k2")) == 2.0


@pytest.mark.parametrize(
    ("settings", "missing", "message"),
    [
        ({"beta": 0.1}, REFERENCE_LOGPS, "need arrays\\['reference_logps'\\] of the batch, which has"),
        ({"importance_cap": 2.0}, SAMPLER_LOGPS, "need arrays\\['sampler_logps'\\]"),
        ({}, ADVANTAGES, "the batch has no 'advantages', neither in its values"),
        ({"mask_truncated_completions": True}, TRUNCATED, "needs values\\['truncated'\\] of the batch"),
    ],
)
def test_a_batch_without_what_the_loss_reads_is_refused(pullback, settings, missing, message):
    batch = everything(PACKED)
    statistics, _ = pullback(batch, 1.0)
    values, arrays = ({n: x for n, x in have.items() if n != missing} for have in (batch.values, batch.arrays))
    with pytest.raises(ValueError, match=message):
        policy_sums(statistics, batch._replace(values=values, arrays=arrays), PolicySettings(**settings))


def test_settings_that_a_loss_cannot_do_without_are_asked_for():
    with pytest.raises(ValueError, match="loss_type='cispo' limits ratios to epsilon_high, which is None"):
        PolicySettings(loss_type="cispo")
    with pytest.raises(ValueError, match="loss_type='dr_grpo' divides by max_completion_length, which is None"):
        PolicySettings(loss_type="dr_grpo")
