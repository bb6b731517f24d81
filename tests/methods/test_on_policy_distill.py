"""Distillation on the model's own answers: to the prompts of the rows, in the steps that the seed chooses."""

import jax
import numpy as np
import pytest
from online_runs import started
from pair_runs import SGD, config_of, train_lose_the_end_and_resume, write_rows

from jaxft.assets import ASSETS
from jaxft.errors import ConfigError, DataError
from jaxft.methods import method_of
from jaxft.methods.online.own_answers import OwnAnswersFeed, prompts_of
from jaxft.runs.build import load_frozen, with_frozen
from jaxft.runs.train import set_up

ROWS = [{"prompt": f"Colour {n}?", "completion": f" {'red' if n % 2 else 'blue'} {n % 5}"} for n in range(24)]


SETTINGS = {
    "method.distill.teacher": str(ASSETS / "smoke"), "method.distill.teacher_random_init": True,
    "method.distill.lmbda": 1.0, "method.distill.max_new_tokens": 12, "data.max_length": 64,
}  # fmt: skip


def distil(tmp_path, **overrides):
    return config_of("distill", write_rows(tmp_path, ROWS), tmp_path / "run", **SETTINGS | overrides)


def test_a_run_on_its_own_answers_learns_and_resumes_bit_for_bit(tmp_path):
    config = distil(tmp_path, **{"optim.learning_rate": 3e-2})
    lines, _ = train_lose_the_end_and_resume(config, tmp_path / "run")
    assert all(line["on_policy"] == 1 and line["completions/max_length"] <= 12 for line in lines)
    assert lines[-1]["divergence"] < lines[0]["divergence"]


def test_the_prompts_are_those_of_the_rows_and_nothing_else_is_kept(tmp_path):
    config = distil(tmp_path)
    with started(config, tmp_path) as (run, graphdef, state, _):
        given = run.source.batch(2)
        batch = method_of(config).feed(run, graphdef)(state, 2)
        again = method_of(config).feed(run, graphdef)(state, 2)
        decode = run.tokenizer.decode
    prompts = sorted(decode(prompt.tokens) for prompt in prompts_of(given))
    assert prompts and all(prompt.startswith("Colour ") and prompt.endswith("?") for prompt in prompts)
    sampled = prompts_of(jax.tree.map(np.asarray, batch))
    assert sorted(decode(prompt.tokens) for prompt in sampled) == prompts
    np.testing.assert_array_equal(batch.tokens_BS, again.tokens_BS)
    texts = {tuple(row[weights > 0].tolist()) for row, weights in zip(given.targets_BS, given.weights_BS, strict=True)}
    own = jax.tree.map(np.asarray, batch)
    assert not texts & {tuple(t[w > 0].tolist()) for t, w in zip(own.targets_BS, own.weights_BS, strict=True)}


def test_rows_with_the_same_prompt_do_not_share_it(tmp_path):
    """The loss of distillation reads every document as it is in its row."""
    rows = [row | {"prompt": "Which colour is it?"} for row in ROWS]
    config = config_of("distill", write_rows(tmp_path, rows), tmp_path / "run", **SETTINGS)
    with started(config, tmp_path) as (run, graphdef, state, _):
        batch = method_of(config).feed(run, graphdef)(state, 0)
        decode = run.tokenizer.decode
    assert batch.whole is None
    prompts = prompts_of(jax.tree.map(np.asarray, batch))
    assert [decode(prompt.tokens) for prompt in prompts] == ["Which colour is it?"] * len(prompts)


def test_a_share_of_the_steps_is_on_policy(tmp_path):
    config = distil(tmp_path, **{"method.distill.lmbda": 0.5})
    with started(config, tmp_path) as (run, graphdef, state, _):
        feed = method_of(config).feed(run, graphdef)
        chosen = [feed.is_on_policy(step) for step in range(200)]
        step = chosen.index(False)
        given = run.source.batch(step)
        np.testing.assert_array_equal(feed(state, step).tokens_BS, given.tokens_BS)
        assert feed.metrics(step)["on_policy"] == 0
    assert 70 < sum(chosen) < 130
    nothing = OwnAnswersFeed(run, graphdef, share=0.0, max_new_tokens=4, temperature=1.0)
    assert not any(map(nothing.is_on_policy, range(50)))


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
    outcomes = []
    for sizes in (None, {"data": 2, "fsdp": 2, "tensor": 2}):
        config = distil(tmp_path, **SGD | {"optim.learning_rate": 0.1})
        with started(config, tmp_path, sizes=sizes) as (run, graphdef, state, step):
            state = with_frozen(state, load_frozen(run.config, run.mesh))
            outcomes.append(step(state, method_of(config).feed(run, graphdef)(state, 0)))
    (state, metrics), (other, other_metrics) = outcomes
    for name in metrics:
        np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(other.trainable), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"method.distill.cache_top_k": 4}, ConfigError, "trains on answers that are sampled later"),
        ({"method.distill.sft_weight": 0.5}, ConfigError, "would teach the model the tokens that it sampled itself"),
        ({"method.distill.max_new_tokens": 60}, DataError, "does not fit into data.max_length=64: raise that to 70"),
        ({"method.distill.lmbda": 0.0}, ConfigError, "method.distill.max_new_tokens=12 is read only if"),
        ({"method.distill.lmbda": 1.5}, ConfigError, "must be from 0 to 1"),
    ],
)
def test_settings_that_it_cannot_train_with_are_refused(tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        set_up(distil(tmp_path, **overrides))
