"""`jaxft.Session`: its calls are the steps of `jaxft train`, several are one, and its state resumes bit for bit."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pair_runs import KINDS, LABELLED, SGD, config_of, weights_of, write_rows

import jaxft
from jaxft import api
from jaxft.errors import CheckpointError, ConfigError, DataError, ExportError
from jaxft.objectives.policy.advantages import group_advantages
from jaxft.objectives.policy.loss import policy_logps
from jaxft.training.state import TrainState

ROWS = [{"prompt": row["prompt"], "completion": row["completion"]} for row in LABELLED]
PROMPTS = ["Colour 1?", "Colour 2?"]


def config_for(folder, **overrides):
    """A LoRA session on drawn weights, one device, batches of 8 sequences of 64 tokens."""
    settings = {
        "data.max_length": 64, "data.shuffle": False, "data.packing": False, "data.eval": None, "train.steps": 3,
        "train.eval_every": None, "checkpoint.every": 3, "mesh.fsdp": 1,
    }  # fmt: skip
    settings |= {"output_dir": str(folder / "session"), "method.name": "grpo"} | overrides
    method, output = settings.pop("method.name"), settings.pop("output_dir")
    return config_of(method, write_rows(folder, ROWS), output, **settings)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """A session takes all devices; these tests have one, except those that say so."""
    devices = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices[:1])
        yield devices


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="module")
def session(folder):
    """A session whose weights the tests do not change; they forget what they add."""
    return jaxft.Session(config_for(folder))


def gradients_of(session):
    """The gradients that wait, divided as an update divides them, and the loss; they are then forgotten."""
    grads = [np.asarray(leaf) / float(session._sums.weight) for leaf in jax.tree.leaves(session._grads)]
    loss = float(session._sums.total / session._sums.weight)
    session._forget()
    return grads, loss


def assert_close(got, expected, tolerance=1e-5):
    """Each array within `tolerance` of its largest expected value."""
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-8))


def arrays_of(session):
    return [np.asarray(x) for x in jax.tree.leaves((session._state.trainable, session._state.opt_state))]


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_fine_tuning_by_calls_is_jaxft_train(folder, tmp_path, monkeypatch, one_device, devices):
    monkeypatch.setattr(jax, "devices", lambda *_: one_device[:devices])
    config = config_for(folder, **{"output_dir": str(tmp_path / "run"), "method.name": "sft", "mesh.fsdp": devices})
    api.train(config)
    by_hand = jaxft.Session(config)
    for step in range(3):
        by_hand.forward_backward(ROWS[step * 8 : step * 8 + 8])
        metrics = by_hand.optim_step()
    assert by_hand.step == 3 and metrics["skipped_updates"] == 0
    assert metrics["learning_rate"] == pytest.approx(config.optim.learning_rate * 0.25)
    by_hand.export(str(tmp_path / "hand" / "adapter"))
    got, expected = weights_of(tmp_path / "hand"), weights_of(tmp_path / "run")
    assert got == expected


def test_several_calls_are_one(session):
    together = session.forward_backward(ROWS)
    whole, loss = gradients_of(session)
    parts = [session.forward_backward(part) for part in (ROWS[:3], ROWS[3:14], ROWS[14:])]
    added, loss_of_parts = gradients_of(session)
    assert_close(added, whole)
    assert loss == pytest.approx(together["loss"]) == pytest.approx(loss_of_parts, rel=1e-6)
    trained = [part["trained_tokens"] for part in parts]
    assert sum(trained) == together["trained_tokens"]
    assert together["loss"] == pytest.approx(np.average([part["loss"] for part in parts], weights=trained), rel=1e-5)


def test_a_function_of_log_probabilities(session):
    session.forward_backward(ROWS)
    expected, loss = gradients_of(session)

    def nll(logps):
        return -sum(jnp.sum(one) for one in logps), sum(len(one) for one in logps)

    metrics = session.forward_backward(ROWS, nll)
    got, _ = gradients_of(session)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert_close(got, expected)


def test_a_function_of_pairs_has_the_gradient_of_jax(session):
    """Neighbouring rows are pairs, in several batches; the oracle is one forward pass, differentiated whole."""

    def pairs(logps):
        sums = jnp.stack([jnp.sum(one) for one in logps])
        return -jnp.sum(jax.nn.log_sigmoid(0.1 * (sums[::2] - sums[1::2]))), len(logps) // 2

    metrics = session.forward_backward(ROWS[:12], pairs)
    got, loss = gradients_of(session)
    assert metrics["loss"] == pytest.approx(loss)
    from jaxft.runs.session.rows import examples_of, pack_examples, plain

    examples = plain(examples_of(ROWS[:12], session.config, session.tokenizer))
    batches = pack_examples(examples, session.config, 0).batches
    assert len(batches) == 2
    batch = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
    state: TrainState = session._state

    def oracle(trainable):
        logps_BS = policy_logps(nnx.merge(session._graphdef, trainable, state.frozen), batch)
        sums = jnp.sum(logps_BS, axis=1)[:12]
        return -jnp.mean(jax.nn.log_sigmoid(0.1 * (sums[::2] - sums[1::2])))

    value, grads = jax.value_and_grad(oracle)(state.trainable)
    assert loss == pytest.approx(float(value), rel=1e-5)
    assert_close(got, [np.asarray(x) for x in jax.tree.leaves(grads)])


def test_log_probabilities_are_those_of_sampling(session):
    groups = session.sample(PROMPTS, n=2, max_new_tokens=8, seed=5)
    answers = [one for group in groups for one in group]
    assert [len(group) for group in groups] == [2, 2] and len({one.text for one in answers}) == 4
    for one, logps in zip(answers, session.logprobs(answers), strict=True):
        np.testing.assert_allclose(logps, one.logprobs, atol=1e-4)
        assert one.text == session.tokenizer.decode(one.tokens)
    again = session.sample(PROMPTS, n=2, max_new_tokens=8, seed=5)
    assert [one.tokens.tolist() for group in again for one in group] == [one.tokens.tolist() for one in answers]
    (greedy,) = session.sample([[{"role": "user", "content": "Hi"}]], temperature=0)
    assert greedy[0].temperature == 0
    # As many as fit.
    assert len(greedy[0].prompt_tokens) + len(greedy[0].tokens) <= 64
    cooler = session.logprobs(answers, temperature=0.5)
    assert not np.allclose(cooler[0], answers[0].logprobs, atol=1e-2)


def test_a_policy_gradient_is_that_of_the_surrogate(session):
    """At the first update the gradient of dapo is that of -sum(advantage x log-probability) over the tokens."""
    answers = [one for group in session.sample(PROMPTS, n=3, max_new_tokens=8, seed=6) for one in group]
    advantages = [0.5, -1.0, 0.5, 2.0, 0.0, -2.0]

    def surrogate(logps):
        terms = [a * jnp.sum(one) for a, one in zip(advantages, logps, strict=True)]
        return -sum(terms), sum(len(one) for one in logps)

    session.forward_backward(answers, surrogate)
    expected, _ = gradients_of(session)
    session.forward_backward(answers, "grpo", advantages=advantages)
    got, _ = gradients_of(session)
    assert_close(got, expected, 1e-4)
    by_token = [np.full(len(one.tokens), a) for a, one in zip(advantages, answers, strict=True)]
    old = [logps - 0.1 for logps in session.logprobs(answers)]
    metrics = session.forward_backward(answers, "grpo", advantages=by_token, old_logprobs=old)
    ratios, _ = gradients_of(session)
    # All ratios are exp(0.1), inside of the clip, and importance weights are exp(-0.1) again.
    assert metrics["clip_ratio/high_mean"] == 0
    assert_close(ratios, expected, 1e-3)


def test_a_loop_by_hand_learns_from_rewards_and_goes_on_bit_for_bit(folder, tmp_path):
    # All weights: an adapter hardly moves the distribution of drawn weights, whose logits are small.
    overrides = KINDS["full"] | {"rollout.num_generations": 8, "train.steps": 8}
    config = config_for(folder, **overrides)
    session = jaxft.Session(config)

    def steps(session, count):
        means = []
        for _ in range(count):
            answers = [one for group in session.sample(PROMPTS, n=8, max_new_tokens=8) for one in group]
            rewards = np.array([np.mean(one.tokens % 2) for one in answers])
            advantages = group_advantages(rewards, np.repeat([0, 1], 8))
            session.forward_backward(answers, "grpo", advantages=advantages)
            session.optim_step(learning_rate=2e-2)
            means.append(rewards.mean())
        return means

    means = steps(session, 6)
    assert means[0] < 0.75 and means[-1] > means[0] + 0.15, means
    session.save_state(str(tmp_path / "state"))
    assert steps(session, 2)[-1] > means[0]
    again = jaxft.Session(config)
    again.load_state(str(tmp_path / "state"))
    assert again.step == 6
    steps(again, 2)
    for a, b in zip(arrays_of(again), arrays_of(session), strict=True):
        np.testing.assert_array_equal(a, b)
    # The folder is one that other commands read.
    exported = api.export(str(tmp_path / "state"), str(tmp_path / "exported"), format="merged")
    assert max(exported["checks"].values()) < 1e-4
    again.load_state(str(tmp_path / "state"))
    with pytest.raises(CheckpointError, match="step 6 exists already"):
        again.save_state(str(tmp_path / "state"))
    other = jaxft.Session(dataclasses.replace(config, seed=1))
    with pytest.raises(ConfigError, match="other settings:\n  seed: was 0, now 1"):
        other.save_state(str(tmp_path / "state"))


def test_the_rate_is_the_schedules_or_the_callers(folder):
    config = config_for(folder, **SGD | {"train.steps": None, "optim.warmup_steps": 2})
    session = jaxft.Session(config)
    before = [np.asarray(x) for x in jax.tree.leaves(session._state.trainable)]
    session.forward_backward(ROWS[:8])
    grads, _ = gradients_of(session)
    session.forward_backward(ROWS[:8])
    metrics = session.optim_step(learning_rate=0.25)
    assert metrics["learning_rate"] == 0.25
    after = [np.asarray(x) for x in jax.tree.leaves(session._state.trainable)]
    assert_close([a - b for a, b in zip(after, before, strict=True)], [-0.25 * g for g in grads], 1e-4)
    rates = []
    for _ in range(3):
        session.forward_backward(ROWS[:8])
        rates.append(session.optim_step()["learning_rate"])
    # The first update of the warm-up had the caller's rate; without train.steps it stays at its peak.
    assert rates == [1.0, 1.0, 1.0]
    answer = dataclasses.replace(session.sample(["Hi"], max_new_tokens=4)[0][0], trained=np.zeros(4, bool))
    assert session.forward_backward([answer], "grpo", advantages=[1.0])["trained_tokens"] == 0
    before = arrays_of(session)[0]
    assert session.optim_step()["skipped_updates"] == 1
    np.testing.assert_array_equal(arrays_of(session)[0], before)


def test_what_calls_cannot_do_is_refused(session, folder, tmp_path):
    with pytest.raises(ConfigError, match="no gradients to update with: call forward_backward first"):
        session.optim_step()
    with pytest.raises(ConfigError, match=r"loss='sfd' is not one of sft, grpo, rloo. Did you mean 'sft'\?"):
        session.forward_backward(ROWS, "sfd")
    with pytest.raises(ConfigError, match="loss='grpo' needs advantages"):
        session.forward_backward(ROWS, "grpo")
    with pytest.raises(DataError, match="trains answers of `sample`, and row 0 is a dict"):
        session.forward_backward(ROWS, "grpo", advantages=[1.0] * len(ROWS))
    (answer,) = session.sample(["Hi"], temperature=0.5, max_new_tokens=4)[0]
    with pytest.raises(DataError, match=r"sampled at temperature 0.5.*rollout.temperature=1.0"):
        session.forward_backward([answer], "grpo", advantages=[1.0])
    (answer,) = session.sample(["Hi"], max_new_tokens=4)[0]
    with pytest.raises(DataError, match="2 advantages for 1 rows"):
        session.forward_backward([answer], "grpo", advantages=[1.0, 2.0])
    with pytest.raises(DataError, match=r"old_logprobs\[0\] has the shape \(2,\), and the row has 4 trained tokens"):
        session.forward_backward([answer], "grpo", advantages=[1.0], old_logprobs=[np.zeros(2)])
    with pytest.raises(ConfigError, match="loss='sft' reads neither advantages"):
        session.forward_backward(ROWS, advantages=[1.0])
    with pytest.raises(DataError, match="row 1 .* do not fit into data.max_length=64"):
        session.forward_backward([ROWS[0], {"prompt": "a", "completion": "long " * 80}])
    with pytest.raises(DataError, match="there are no rows"):
        session.forward_backward([])
    session.forward_backward(ROWS[:2])
    with pytest.raises(ConfigError, match="since the last update are of loss='sft', and these are of 'grpo'"):
        session.forward_backward([answer], "grpo", advantages=[1.0])
    with pytest.raises(ConfigError, match="gradients wait for their update, and are not saved"):
        session.save_state(str(tmp_path / "state"))
    session._forget()
    with pytest.raises(ConfigError, match="has no whole checkpoint"):
        session.load_state(str(tmp_path / "none"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ExportError, match="is not empty"):
        session.export(str(tmp_path / "full"))
    with pytest.raises(ConfigError, match="format='gguf' cannot be written"):
        session.export(str(tmp_path / "new"), format="gguf")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method.name": "dpo"}, "method.name='dpo' has rows or arrays of its own"),
        ({"method.name": "sft", "train.matmul_dtype": "int8"}, "matmul_dtype='int8' was tested in whole runs alone"),
        ({"adapter.init_lora_weights": "eva"}, "init_lora_weights='eva' is made from the rows of a run"),
    ],
)
def test_sessions_that_cannot_be_are_refused(folder, overrides, message):
    with pytest.raises(ConfigError, match=message):
        jaxft.Session(config_for(folder, **overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"adapter.dropout": 0.1}, "adapter.dropout=0.1 would change the log-probabilities"),
        ({"method.grpo.entropy_coef": 0.1}, "set method.grpo.entropy_coef to 0"),
        ({"method.grpo.mask_truncated_completions": True}, "leaves answers out by their finish_reason"),
    ],
)
def test_losses_that_cannot_be_are_refused(session, folder, overrides, message):
    from jaxft.runs.session.losses import loss_of

    with pytest.raises(ConfigError, match=message):
        loss_of("grpo", config_for(folder, **overrides), session._model)


@pytest.mark.parametrize("block", [0, 1])
def test_the_example_on_the_page_runs(folder, session, tmp_path, monkeypatch, block):
    page = (Path(__file__).parents[2] / "docs" / "session.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[block]
    names = {"jax": jax}
    base = str(folder / "session" / "base")
    monkeypatch.chdir(tmp_path)
    exec(
        code.replace("runs/models/SmolLM2-135M-Instruct", base).replace('"data.max', '"mesh.fsdp": 1, "data.max'), names
    )
    if block == 0:
        assert names["session"].step == 4
        assert (tmp_path / "runs" / "session-adapter" / "adapter_model.safetensors").is_file()
    else:
        assert session.forward_backward(ROWS[:4], names["preference"])["loss"] > 0
        session._forget()


def test_a_path_with_settings_is_a_session(folder, session):
    base = str(folder / "session" / "base")
    settings = {"adapter.r": 2, "data.max_length": 64, "train.batch_size": 2, "mesh.fsdp": 1, "model.dtype": "float32"}
    own = jaxft.Session(base, settings)
    assert own.config.adapter.r == 2 and own.config.model.path == base
    assert own.logprobs(ROWS[:1])[0].shape == session.logprobs(ROWS[:1])[0].shape
    with pytest.raises(ConfigError, match="overrides belong to a model path"):
        jaxft.Session(own.config, settings)
    with pytest.raises(ConfigError, match="rank"):
        jaxft.Session(base, {"adapter.rank": 2})
