"""PPO as whole runs: it learns, resumes bit for bit, credits tokens as published, and exports the policy alone."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from online_runs import online_config, started
from pair_runs import SGD, metrics_of, train_lose_the_end_and_resume, weights_of
from safetensors.numpy import load_file

from jaxft import api
from jaxft.adapters.critic import Critic, critic_values
from jaxft.checkpoint.load import load_model
from jaxft.data.batch import Batch
from jaxft.errors import ConfigError
from jaxft.methods import method_of, ppo
from jaxft.methods.online.passes import Passes
from jaxft.objectives.policy.loss import policy_logps
from jaxft.runs.build import abstract_model
from jaxft.runs.export import load_trained
from jaxft.runs.train import set_up
from jaxft.training.state import divide

REUSED = {
    "rollout.steps_per_rollout": 2, "rollout.num_iterations": 2, "train.steps": 8, "checkpoint.every": 4,
    "train.eval_every": 4, "method.ppo.kl_target": 0.5, "method.ppo.kl_horizon": 100,
}  # fmt: skip


def test_a_run_learns_resumes_bit_for_bit_and_exports_the_policy_alone(tmp_path):
    config = online_config(
        "ppo", tmp_path, tmp_path / "run",
        **{
            "method.ppo.kl_target": 6.0, "method.ppo.kl_horizon": 100, "method.ppo.lam": 1.0,
            "rollout.num_generations": 1,
        },
    )  # fmt: skip
    lines, summary = train_lose_the_end_and_resume(config, tmp_path / "run")
    first = lines[0]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4) and first["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["policy/clipfrac_avg"] == 0 and first["objective/scores"] == first["reward"]
    # Values are 0 at the start, so that the first loss of the critic is half the mean square of the returns.
    assert first["loss/value_avg"] > 0 and "frac_reward_zero_std" not in first
    assert summary["eval_reward"] > first["reward"] + 0.2
    # The divergence is first below its target: the coefficient falls by 0.2 x 8 / 100.
    coefficients = [line["objective/kl_coef"] for line in lines]
    assert coefficients[:2] == pytest.approx([0.05, 0.05 * (1 - 0.2 * 8 / 100)], rel=1e-6)
    assert (tmp_path / "run" / "completions.jsonl").read_text() == (
        tmp_path / "whole" / "completions.jsonl"
    ).read_text()
    adapter = tmp_path / "run" / "adapter"
    names = load_file(adapter / "adapter_model.safetensors")
    assert names and all("lora_" in name for name in names)
    trained = load_trained(str(tmp_path / "run"))
    assert trained.module.value is None
    tokens = np.arange(2 * 9).reshape(2, 9) % 50
    np.testing.assert_array_equal(load_model(str(adapter)).logits(tokens), trained.logits(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{}, {"model.quantization": "nf4"}], ids=["lora", "qlora"])
def test_answers_that_are_trained_on_four_times_are_resumed_bit_for_bit(tmp_path, overrides):
    config = online_config("ppo", tmp_path, tmp_path / "run", **REUSED | overrides)
    api.train(config)
    folder, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(folder, whole)
    shutil.rmtree(folder / "checkpoints" / "8")
    api.train(config)
    assert weights_of(folder) == weights_of(whole) and metrics_of(folder) == metrics_of(whole)
    lines = [line for line in metrics_of(folder) if "loss" in line]
    # The coefficient is that of the rollout, whichever of its four updates is logged.
    assert len({line["objective/kl_coef"] for line in lines[:4]}) == 1
    assert lines[4]["objective/kl_coef"] == pytest.approx(0.05 * (1 - 0.2 * 16 / 100), rel=1e-6)
    assert lines[0]["val/ratio"] == pytest.approx(1, abs=1e-5) and lines[3]["policy/approxkl_avg"] > 0


@pytest.fixture(scope="module")
def rollout(tmp_path_factory):
    """A rollout of weights away from the start: its run, what sampled it, what was judged, and its updates."""
    folder = tmp_path_factory.mktemp("ppo")
    config = online_config(
        "ppo", folder, folder / "run", "some",
        **SGD, **{
            "train.batch_size": 12, "method.ppo.kl_coef": 0.3, "method.ppo.lam": 0.8, "method.ppo.gamma": 0.9,
            "rollout.share_prompts": False,
        },
    )  # fmt: skip
    with started(config, folder) as (run, graphdef, state, step):
        state = state._replace(trainable=moved(state.trainable))
        passes, feed = Passes(run, graphdef), method_of(config).feed(run, graphdef)
        judged = feed._judged(state, 0)[0]
        yield run, graphdef, state, step, passes, judged, ppo.make_updates(run, judged, state, passes)


def moved(trainable, size=0.05):
    return jax.tree.map(lambda x: x + size * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape), trainable)


def spans(batch):
    """(row, slice) of the sampled tokens of every document that has any, by its prompt and its answer."""
    found = {}
    for row, segments in enumerate(batch.segments_BS):
        for document in range(1, segments.max() + 1):
            inside = np.flatnonzero(segments == document)
            found[tuple(batch.tokens_BS[row][inside].tolist())] = row, inside
    return found


def test_tokens_are_credited_as_the_recursion_says(rollout):
    """Against loops over the tokens as in arXiv:1506.02438 and the formulas of TRL's trainer, within 1e-5."""
    _, _, state, _, passes, judged, updates = rollout
    (batch,) = updates.batches
    sampled = {"old": passes.policy_logps(state, batch), "reference": passes.reference_logps(state, batch)}
    values_BS, found = passes.values(state, batch), spans(batch)
    assert np.isnan(judged.rewards).any() and np.abs(values_BS).max() > 0.01
    expected, returns, places = [], [], []
    for one, score in zip(judged.rollouts, judged.rewards, strict=True):
        row, inside = found[(*one.prompt.tokens.tolist(), *one.tokens.tolist())]
        own = inside[len(one.prompt) - 1 : -1]
        if np.isnan(score):
            assert not batch.weights_BS[row, inside].any() and not batch.arrays["returns"][row, inside].any()
            continue
        old, reference = one.logprobs.astype(np.float64), sampled["reference"][row, own]
        if len(one.prompt) and batch.weights_BS[row, own].all():
            np.testing.assert_allclose(sampled["old"][row, own], old, atol=1e-4)
        values, last = values_BS[row, own].astype(np.float64), 0.0
        answer = np.zeros(len(own))
        for t in reversed(range(len(own))):
            reward = -0.3 * (batch.arrays["old_logps"][row, own[t]] - reference[t]) + score * (t == len(own) - 1)
            later = values[t + 1] if t + 1 < len(own) else 0.0
            last = reward + 0.9 * later - values[t] + 0.9 * 0.8 * last
            answer[t] = last
        expected.append(answer)
        returns.append(answer + values)
        places.append((row, own))
    every = np.concatenate(expected)
    mean, deviation = every.mean(), np.sqrt(every.var(ddof=1) + 1e-8)
    for (row, own), answer, target in zip(places, expected, returns, strict=True):
        np.testing.assert_allclose(batch.arrays["advantages"][row, own], (answer - mean) / deviation, atol=1e-5)
        np.testing.assert_allclose(batch.arrays["returns"][row, own], target, atol=1e-5)
    assert batch.weights_BS.sum() == len(every)


def test_the_loss_and_its_gradient_are_those_of_torch(rollout):
    """Clipped surrogate and clipped value loss written out in torch; its slopes are led back through the model."""
    torch = pytest.importorskip("torch")
    run, graphdef, state, _, _, _, updates = rollout
    batch = jax.tree.map(jnp.asarray, updates.batches[0])
    later = moved(state.trainable, 0.02)
    loss = method_of(run.config).loss(run.config, run.model)

    def ours(trainable):
        sums = loss(nnx.merge(graphdef, trainable, state.frozen), batch, None, state.method)
        return sums.total / sums.weight, sums.means()

    def outputs(trainable):
        model = nnx.merge(graphdef, trainable, state.frozen)
        values = critic_values(model, batch)
        return policy_logps(model, batch), values

    (value, means), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(later)
    (logps, values), back = jax.vjp(jax.jit(outputs), later)
    mask = torch.tensor(np.asarray(batch.weights_BS)) > 0
    new, predicted = (torch.tensor(np.asarray(x), requires_grad=True) for x in (logps, values))
    given = {name: torch.tensor(np.asarray(x))[mask] for name, x in batch.arrays.items()}
    ratio = torch.exp(new[mask] - given["old_logps"])
    policy = torch.max(-given["advantages"] * ratio, -given["advantages"] * ratio.clamp(0.8, 1.2))
    v, old, target = predicted[mask], given["values"], given["returns"]
    critic = 0.5 * torch.max((v - target) ** 2, (torch.clamp(v, old - 0.2, old + 0.2) - target) ** 2)
    whole = policy.mean() + 0.1 * critic.mean()
    whole.backward()
    assert float(value) == pytest.approx(whole.item(), rel=1e-5)
    assert float(means["loss/policy_avg"]) == pytest.approx(policy.mean().item(), rel=1e-4)
    assert float(means["loss/value_avg"]) == pytest.approx(critic.mean().item(), rel=1e-5)
    assert float(means["val/ratio"]) == pytest.approx(ratio.mean().item(), rel=1e-5)
    assert 0 < float(means["policy/clipfrac_avg"]) < 1
    expected = back((jnp.asarray(new.grad.numpy()), jnp.asarray(predicted.grad.numpy())))[0]
    paths = jax.tree_util.tree_leaves_with_path(gradient)
    assert any("value" in jax.tree_util.keystr(path) for path, _ in paths)
    for (path, a), b in zip(paths, jax.tree.leaves(expected), strict=True):
        largest = np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * largest, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"train.accumulation_steps": 4}, None),
        pytest.param({"data.packing": False}, None, marks=pytest.mark.slow),
        pytest.param({"rollout.share_prompts": False}, None, marks=pytest.mark.slow),
        ({}, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
    ids=["accumulation", "unpacked", "prompts", "devices"],
)
def test_how_a_batch_is_cut_changes_nothing(tmp_path, changes, sizes):
    outcomes = []
    for more, axes in (({}, None), (changes, sizes)):
        overrides = SGD | {"optim.learning_rate": 0.1, "method.ppo.kl_target": 1.0, "method.ppo.kl_horizon": 100}
        config = online_config("ppo", tmp_path, tmp_path / "run", **overrides | more)
        with started(config, tmp_path, sizes=axes) as (run, graphdef, state, step):
            shardings = jax.tree.map(lambda x: x.sharding, state.trainable)
            state = state._replace(trainable=jax.jit(moved, out_shardings=shardings)(state.trainable))
            feed = method_of(config).feed(run, graphdef)
            outcomes.append((*step(state, feed(state, 0)), feed.metrics(0)))
    (state, metrics, logged), (other, other_metrics, other_logged) = outcomes
    # Answers share a prompt in some of the layouts, whose tokens are then counted once.
    for name in set(metrics) - {"sampling/sampling_logp_difference/max", "num_tokens"}:
        np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for name in (name for name in logged if name.startswith("objective/")):
        np.testing.assert_allclose(other_logged[name], logged[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert other.method.saved["kl_coef"] == pytest.approx(float(state.method.saved["kl_coef"]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(other.trainable), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)


def test_the_coefficient_follows_the_divergence_once_a_rollout(tmp_path):
    settings = {"rollout.steps_per_rollout": 2, "rollout.num_iterations": 2, "checkpoint.every": 4}
    config = online_config("ppo", tmp_path, tmp_path / "run", **settings | {"method.ppo.kl_target": 4.0})
    adapt = ppo.next_saved(config)

    def after(divergence, step):
        blank = jnp.zeros((1, 2), jnp.int32)
        batch = Batch(blank, blank, blank, blank, blank, values={ppo.ROLLOUT_KL: jnp.full((1, 2), divergence)})
        return float(adapt({"kl_coef": jnp.float32(0.1)}, jnp.int32(step), batch)["kl_coef"])

    # 16 answers in a rollout, of a horizon of 10,000; errors count up to 0.2.
    for divergence, error in ((4.4, 0.1), (3.6, -0.1), (9.0, 0.2), (-1.0, -0.2), (4.0, 0.0)):
        assert after(divergence, 3) == pytest.approx(0.1 * (1 + error * 16 / 10_000), rel=1e-6)
        assert after(divergence, 7) == after(divergence, 3)
        assert all(after(divergence, step) == pytest.approx(0.1) for step in (0, 1, 2, 4))
    fixed = online_config("ppo", tmp_path, tmp_path / "run")
    assert ppo.next_saved(fixed) is None and ppo.initial_state(fixed, nnx.State({})) is None


def test_a_rollout_without_scores_is_skipped_but_counts_in_the_divergence(tmp_path):
    adaptive = {"method.ppo.kl_target": 1.0, "method.ppo.kl_horizon": 100}
    config = online_config("ppo", tmp_path, tmp_path / "run", "nothing", **adaptive)
    with started(config, tmp_path) as (run, graphdef, state, step):
        feed = method_of(config).feed(run, graphdef)
        after, metrics = step(state, feed(state, 0))
    assert metrics["skipped_updates"] == 1 and "objective/scores" not in feed.metrics(0)
    assert float(after.method.saved["kl_coef"]) == pytest.approx(0.05 * (1 - 0.2 * 8 / 100), rel=1e-6)
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(after.trainable), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"adapter.kind": "none", "export.merged": False}, "trains a critic beside the policy.*train with an adapter"),
        ({"adapter.kind": "prompt", "adapter.num_virtual_tokens": 4}, "virtual tokens into every row"),
        ({"adapter.modules_to_save": "norm"}, "keeps one base for policy and critic"),
        ({"adapter.init_lora_weights": "loftq", "model.quantization": "nf4"}, "Set it to 'default'\\.$"),
        ({"rollout.max_redraws": 2}, "its critic judges each answer by itself"),
        ({"method.ppo.kl_coef": 0.0, "method.ppo.kl_target": 6.0}, "set kl_coef above 0, or kl_target to None"),
        ({"method.ppo.kl_horizon": 5}, "method.ppo.kl_target is set"),
        ({"rewards.functions": None}, "learns from rewards, but rewards.functions is None"),
        ({"rollout.num_iterations": 2}, "checkpoint.every=3 would save in the middle of a rollout"),
    ],
)
def test_settings_that_it_cannot_train_with_are_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        set_up(online_config("ppo", tmp_path, tmp_path / "run", **overrides))


def test_plans_have_the_critic_and_the_arrays_of_a_batch(rollout, tmp_path):
    run, *_, updates = rollout
    shapes = method_of(run.config).batch_shapes(run.config)
    (batch,) = updates.batches
    assert shapes.values.keys() == batch.values.keys() and shapes.arrays.keys() == batch.arrays.keys()
    adaptive = online_config("ppo", tmp_path, tmp_path / "run", **{"method.ppo.kl_target": 1.0})
    assert set(method_of(adaptive).batch_shapes(adaptive).values) == {ppo.ROLLOUT_KL}
    trained = [jax.tree.leaves(divide(abstract_model(one))[1]) for one in (run.config, grpo_of(tmp_path))]
    sizes = [sum(leaf.size for leaf in leaves) for leaves in trained]
    assert sizes[0] == 2 * sizes[1] + run.model.config.hidden_size and isinstance(run.model.value, Critic)
    plan = api.plan(run.config, "a100-80:1")
    assert plan["fits"] and json.dumps(plan)


def grpo_of(folder):
    return online_config("grpo", folder, folder / "other")
