"""GRPO as whole runs: it learns, resumes bit for bit, is the same on 8 devices, and leaves out what teaches nothing."""

import dataclasses
import json
import re
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
from online_runs import online_config, started
from pair_runs import KINDS, SGD, metrics_of, train_lose_the_end_and_resume, weights_of

from jaxft import api
from jaxft.errors import ConfigError
from jaxft.methods import grpo, method_of
from jaxft.methods.online import updates
from jaxft.methods.online.passes import Passes
from jaxft.rollouts.judged import judge
from jaxft.runs.train import set_up

REUSED = {
    "rollout.steps_per_rollout": 2, "rollout.num_iterations": 2, "method.grpo.beta": 0.05, "train.steps": 8,
    "checkpoint.every": 4, "train.eval_every": 4, "method.grpo.entropy_coef": 0.001,
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["lora", pytest.param("full", marks=pytest.mark.slow), pytest.param("qlora", marks=pytest.mark.slow)]
)
def test_a_run_learns_and_resumes_bit_for_bit(tmp_path, kind):
    overrides = {"model.quantization": "nf4"} if kind == "qlora" else KINDS[kind]
    config = online_config("grpo", tmp_path, tmp_path / "run", **overrides)
    lines, summary = train_lose_the_end_and_resume(config, tmp_path / "run")
    first = lines[0]
    assert 0.2 < first["reward"] < 0.8 and first["frac_reward_zero_std"] < 1
    assert abs(first["loss"]) < 1e-5 and first["clip_ratio/region_mean"] == 0
    assert first["sampling/sampling_logp_difference/max"] < 1e-4
    # Answers are cut off, so all have the same length, and the greedy ones become odd throughout.
    assert first["completions/clipped_ratio"] > 0.9
    assert summary["eval_reward"] > first["reward"] + 0.2
    rows = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [step for step in range(1, 7) for _ in range(8)]
    assert all(row["rewards"]["odd"] == row["reward"] for row in rows)
    for name in ("completions.jsonl", "held_out_completions.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()
    held_out = [json.loads(line) for line in (tmp_path / "run" / "held_out_completions.jsonl").read_text().splitlines()]
    evaluated = {line["step"] for line in metrics_of(tmp_path / "run") if "eval_reward" in line}
    assert {row["step"] for row in held_out} == evaluated == {0, 3, 6}


@pytest.mark.slow
def test_answers_that_are_trained_on_four_times_are_resumed_bit_for_bit(tmp_path):
    config = online_config("grpo", tmp_path, tmp_path / "run", **REUSED)
    api.train(config)
    folder, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(folder, whole)
    shutil.rmtree(folder / "checkpoints" / "8")
    api.train(config)
    assert weights_of(folder) == weights_of(whole) and metrics_of(folder) == metrics_of(whole)
    lines = [line for line in metrics_of(folder) if "loss" in line]
    # Steps 1 to 4 train on one rollout; the ratio is 1 at the first of them alone.
    assert lines[0]["clip_ratio/region_mean"] == 0 and lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert len({line["reward"] for line in lines[:4]}) == 1 and lines[4]["reward"] != lines[0]["reward"]
    assert lines[3]["kl"] > 0


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """(settings, folder, a judged rollout, updates of it): plain gradient steps, with a reference and old policy."""
    folder = tmp_path_factory.mktemp("grpo")
    overrides = SGD | {"optim.learning_rate": 0.1, "method.grpo.entropy_coef": 0.01}
    return folder, overrides


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"train.accumulation_steps": 4}, None),
        ({"data.packing": False}, None),
        pytest.param({"rollout.share_prompts": False}, None, marks=pytest.mark.slow),
        ({}, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
    ids=["accumulation", "unpacked", "prompts", "devices"],
)
def test_how_a_batch_is_cut_changes_nothing(moved, changes, sizes):
    folder, overrides = moved
    outcomes = []
    for more, axes in (({}, None), (changes, sizes)):
        config = online_config("grpo", folder, folder / "run", **overrides | more)
        with started(config, folder, sizes=axes) as (run, graphdef, state, step):
            batch = method_of(config).feed(run, graphdef)(state, 0)
            outcomes.append((batch.tokens_BS.shape, *step(state, batch)))
    (shape, state, metrics), (other_shape, other, other_metrics) = outcomes
    if "data.packing" in changes or "rollout.share_prompts" in changes:
        assert other_shape[0] > shape[0]
    # A prompt that answers share is counted once.
    for name in set(metrics) - {"sampling/sampling_logp_difference/max", "num_tokens"}:
        np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(other.trainable), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_sharing_prompts_moves_nothing_between_devices(tmp_path):
    collectives = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
    counts = []
    for share in (True, False):
        overrides = {"rollout.share_prompts": share, "train.batch_size": 32, "rollout.num_generations": 8}
        config = online_config("grpo", tmp_path, tmp_path / "run", **overrides | {"data.max_length": 128})
        with started(config, tmp_path, sizes={"data": 2, "fsdp": 2, "tensor": 2}) as (run, graphdef, state, step):
            batch = method_of(config).feed(run, graphdef)(state, 0)
            assert (batch.whole is not None) == share
            counts.append(Counter(collectives.findall(step.lower(state, batch).compile().as_text())))
    assert counts[0] == counts[1] and counts[0]["all-gather"]


@pytest.mark.parametrize(
    "loss_type", ["dapo", pytest.param("grpo", marks=pytest.mark.slow), pytest.param("dr_grpo", marks=pytest.mark.slow)]
)
def test_answers_without_an_advantage_are_left_out_and_change_nothing(tmp_path, loss_type):
    overrides = SGD | {"optim.learning_rate": 0.1, "method.grpo.loss_type": loss_type, "train.batch_size": 24}
    config = online_config("grpo", tmp_path, tmp_path / "run", "some", **overrides)
    with started(config, tmp_path) as (run, graphdef, state, step):
        feed = method_of(config).feed(run, graphdef)
        judged = feed._answer(state, run.source.prompts_of(0), seed=3)
        groups = judged.rewards.reshape(6, 4)
        assert np.isnan(groups).any() and any(len(set(group)) == 1 for group in groups.tolist())
        short = grpo.make_updates(run, judged, state, Passes(run, graphdef)).batches[0]
        advantages = grpo.group_advantages(judged.rewards, judged.groups)
        units = updates.units_of(loss_type, judged.rollouts, config.rollout.max_completion_length)
        long = updates.pack_part(run, list(judged.rollouts), advantages, units, keep_all=True).batch
        assert np.count_nonzero(short.segments_BS) < np.count_nonzero(long.segments_BS)
        (a, metrics), (b, others) = (step(state, batch) for batch in (short, long))
    assert metrics["loss"] == pytest.approx(float(others["loss"]), abs=1e-6)
    for x, y in zip(jax.tree.leaves(a.trainable), jax.tree.leaves(b.trainable), strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-6)


def test_a_step_with_nothing_to_learn_leaves_model_and_optimizer_as_they_are(tmp_path):
    config = online_config("grpo", tmp_path, tmp_path / "run", "alike")
    with started(config, tmp_path) as (run, graphdef, state, step):
        feed = method_of(config).feed(run, graphdef)
        after, metrics = step(state, feed(state, 0))
    assert metrics["skipped_updates"] == 1 and metrics["loss"] == 0
    assert feed.metrics(0)["frac_reward_zero_std"] == 1
    # The counter of the learning rate's schedule goes on; neither weights nor moments move.
    for name in ("trainable", "opt_state"):
        before, now = jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(after, name))
        arrays = [(x, y) for x, y in zip(before, now, strict=True) if x.ndim]
        assert arrays and all(np.array_equal(x, y) for x, y in arrays)
    assert after.step == 1


def test_groups_without_deviation_are_replaced_by_other_prompts(tmp_path):
    config = online_config("grpo", tmp_path, tmp_path / "run", "some", **{"train.batch_size": 24})
    outcomes = []
    for redraws in (0, 3):
        one = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, max_redraws=redraws))
        with started(one, tmp_path) as (run, graphdef, state, _):
            feed = method_of(one).feed(run, graphdef)
            outcomes.append((feed._judged(state, 1)[0], feed._judged(state, 1)))
    (plain, _), (_, (judged, redrawn)) = outcomes
    assert redrawn > 0 and judged.metrics()["frac_reward_zero_std"] < plain.metrics()["frac_reward_zero_std"]
    assert [one.group for one in judged.rollouts] == [n // 4 for n in range(24)]
    assert [one.number for one in judged.rollouts] == list(range(24))
    for before, after in zip(plain.rollouts, judged.rollouts, strict=True):
        if after.prompt.row == before.prompt.row:
            np.testing.assert_array_equal(after.tokens, before.tokens)
    # What was replaced is judged with its own prompt.
    with started(config, tmp_path) as (run, *_):
        again = judge(judged.rollouts, run.rewards)
    np.testing.assert_array_equal(again.rewards, judged.rewards)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rewards.functions": None}, "learns from rewards, but rewards.functions is None"),
        ({"train.batch_size": 6}, "must be a multiple of rollout.num_generations=4"),
        ({"rollout.max_completion_length": 64}, "leaves no room for prompts"),
        ({"data.truncation": "right"}, "would cut prompts"),
        ({"rollout.steps_per_rollout": 2}, "checkpoint.every=3 would save in the middle of a rollout"),
        ({"adapter.dropout": 0.1}, "would change the log-probabilities of answers"),
        ({"method.grpo.loss_type": "cispo"}, "epsilon_high, which is None"),
        ({"method.grpo.delta": 1.1}, "method.grpo.delta=1.1 must be above 1 \\+ epsilon_high=1.2"),
        ({"rewards.functions": "exact"}, "'exact' is not a built-in reward function.*Did you mean"),
        ({"rewards.functions": "absent.py:f"}, "there is no file 'absent.py'"),
        ({"rewards.functions": "exact_match,exact_match=2"}, "several functions called exact_match"),
        ({"rollout.num_generations": 1}, "rollout.num_generations=1 must be at least 2"),
        ({"method.name": "sft"}, "rollout|rewards"),
    ],
)
def test_settings_that_it_cannot_train_with_are_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        config = online_config("grpo", tmp_path, tmp_path / "run", **overrides)
        run = set_up(config)
        with method_of(config).rewards(config, run.data):
            pass


def test_plans_have_the_reference_and_one_shape_for_all_answers(tmp_path):
    plain = online_config("grpo", tmp_path, tmp_path / "run")
    with_reference = online_config("grpo", tmp_path, tmp_path / "run", **{"method.grpo.beta": 0.1})
    method = method_of(plain)
    assert method.reference_passes(plain) == 0 and method.reference_passes(with_reference) == 1
    shapes = method.batch_shapes(plain)
    with started(plain, tmp_path) as (run, graphdef, state, _):
        batch = method.feed(run, graphdef)(state, 0)
    assert shapes.values.keys() == batch.values.keys() and shapes.arrays.keys() == batch.arrays.keys()
    assert shapes.tokens_BS.shape == (8, 64)


@pytest.mark.slow
def test_it_is_planned_for_a_tpu(tmp_path):
    pytest.importorskip("libtpu")
    plans = [
        api.plan(online_config("grpo", tmp_path, tmp_path / "run", **{"method.grpo.beta": beta}), "v5e:1x1")
        for beta in (0.0, 0.1)
    ]
    assert all(plan["steps"] == 6 and plan["fits"] for plan in plans)
    assert all(plan["rollout"]["longest_part"] in plan["rollout"]["seconds"] for plan in plans)
    assert plans[1]["hardware_flops_per_step"] > 1.2 * plans[0]["hardware_flops_per_step"]
