"""RLOO and online DPO as whole runs, and how they credit and choose answers."""

import jax
import numpy as np
import pytest
from online_runs import online_config, started
from pair_runs import SGD, train_lose_the_end_and_resume

from jaxft.errors import ConfigError
from jaxft.methods import method_of, online_dpo
from jaxft.methods.online.passes import Passes
from jaxft.objectives.policy.advantages import leave_one_out
from jaxft.runs.train import set_up

METHODS = ["rloo", "online_dpo"]


@pytest.mark.parametrize("method", ["rloo", pytest.param("online_dpo", marks=pytest.mark.slow)])
def test_a_run_learns_and_resumes_bit_for_bit(tmp_path, method):
    config = online_config(method, tmp_path, tmp_path / "run")
    lines, summary = train_lose_the_end_and_resume(config, tmp_path / "run")
    first = lines[0]
    # At the start the policy is the reference, up to the rounding of two programs.
    assert first["kl" if method == "rloo" else "rewards/margins"] == pytest.approx(0, abs=1e-6)
    if method == "online_dpo":
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert summary["eval_reward"] > first["reward"] + 0.2
    whole, run = ((tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "run"))
    assert whole == run


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_eight_devices_and_four_micro_batches_equal_one(tmp_path, method):
    outcomes = []
    for changes, sizes in (({}, None), ({"train.accumulation_steps": 4}, {"data": 2, "fsdp": 2, "tensor": 2})):
        overrides = SGD | {"optim.learning_rate": 0.1, "train.batch_size": 16} | changes
        config = online_config(method, tmp_path, tmp_path / "run", **overrides)
        with started(config, tmp_path, sizes=sizes) as (run, graphdef, state, step):
            outcomes.append(step(state, method_of(config).feed(run, graphdef)(state, 0)))
    (state, metrics), (other, other_metrics) = outcomes
    assert metrics["skipped_updates"] == 0
    # At the start all ratios to the reference are 1, so that rounding decides which of two is the larger.
    # A prompt that answers share is counted once.
    for name in set(metrics) - {"rewards/accuracies", "num_tokens"}:
        np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(other.trainable), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)


def test_the_divergence_of_an_answer_is_taken_from_its_reward(tmp_path):
    overrides = {"method.rloo.beta": 0.5, "train.batch_size": 16, "rollout.share_prompts": False}
    config = online_config("rloo", tmp_path, tmp_path / "run", **overrides)
    with started(config, tmp_path) as (run, graphdef, state, _):
        feed, passes = method_of(config).feed(run, graphdef), Passes(run, graphdef)
        # Away from the start, so that there is a divergence.
        moved = jax.tree.map(lambda x: x + 0.05 * np.cos(np.arange(x.size)).reshape(x.shape), state.trainable)
        judged = feed._judged(state._replace(trainable=moved), 0)[0]
        updates = (
            method_of(config).feed(run, graphdef)._make_updates(run, judged, state._replace(trainable=moved), passes)
        )
        sampler = [float(one.logprobs.sum()) for one in judged.rollouts]
        base = [passes.reference_logps(state, updates.batches[0])]
    rows = updates.batches[0]
    reference = {}
    for row in range(len(rows.tokens_BS)):
        for document in range(1, rows.segments_BS[row].max() + 1):
            inside = rows.segments_BS[row] == document
            key = tuple(rows.tokens_BS[row][inside].tolist())
            reference[key] = float(base[0][row][inside].sum())
    sums = [reference[(*one.prompt.tokens.tolist(), *one.tokens.tolist())] for one in judged.rollouts]
    penalized = judged.rewards - 0.5 * (np.array(sampler) - np.array(sums))
    assert np.abs(penalized - judged.rewards).max() > 1e-3
    np.testing.assert_allclose(updates.numbers["advantage"], leave_one_out(penalized, judged.groups), atol=1e-4)


def test_the_best_is_preferred_to_the_worst_and_ties_are_left_out():
    nan = float("nan")
    rewards = np.array([1.0, 3.0, 3.0, 0.0, 2.0, 2.0, 2.0, nan, nan, nan, 5.0, nan])
    groups = np.repeat([0, 1, 2], 4)
    assert online_dpo.best_and_worst(rewards, groups) == [(1, 3)]


def test_a_rollout_of_ties_skips_the_step_and_counts_them(tmp_path):
    config = online_config("online_dpo", tmp_path, tmp_path / "run", "alike")
    with started(config, tmp_path) as (run, graphdef, state, step):
        feed = method_of(config).feed(run, graphdef)
        after, metrics = step(state, feed(state, 0))
    assert metrics["skipped_updates"] == 1 and feed.metrics(0)["ties"] == 2 and feed.metrics(0)["pairs"] == 0
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(after.trainable), strict=True):
        np.testing.assert_array_equal(a, b)


def test_both_answers_of_a_pair_are_neighbours(tmp_path):
    config = online_config("online_dpo", tmp_path, tmp_path / "run", **{"train.batch_size": 24})
    with started(config, tmp_path) as (run, graphdef, state, _):
        batch = method_of(config).feed(run, graphdef)(state, 0)
    for tokens, segments in zip(np.asarray(batch.tokens_BS), np.asarray(batch.segments_BS), strict=True):
        assert segments.max() % 2 == 0
        for document in range(1, segments.max(), 2):
            first, second = tokens[segments == document], tokens[segments == document + 1]
            assert first[:8].tolist() == second[:8].tolist()


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("online_dpo", {"rollout.num_iterations": 2, "checkpoint.every": 4}, "prefers answers of the model itself"),
        ("online_dpo", {"data.max_length": 24}, "must hold both answers of a pair"),
        ("rloo", {"adapter.kind": "prompt", "adapter.num_virtual_tokens": 4}, "switching the adapter off"),
    ],
)
def test_settings_that_they_cannot_train_with_are_refused(tmp_path, method, overrides, message):
    with pytest.raises(ConfigError, match=message):
        set_up(online_config(method, tmp_path, tmp_path / "run", **overrides))
