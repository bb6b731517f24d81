"""Training from rewards with an environment: every turn is scored as it was sampled, and only sampled tokens are
trained."""

import json
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from online_runs import online_config, started
from pair_runs import SGD, metrics_of, train_lose_the_end_and_resume

from jaxft import api
from jaxft.config import load
from jaxft.config.method import methods_on
from jaxft.data.tokenizers import tokenizer as tokenizers
from jaxft.errors import ConfigError, DataError
from jaxft.generation import steps
from jaxft.methods import find_method, method_of
from jaxft.methods.online import settings as online
from jaxft.methods.online.passes import Passes
from jaxft.methods.online.updates import pack
from jaxft.rollouts.environments.environments import EnvironmentFailure, Environments
from jaxft.runs.train import set_up

ROOT = Path(__file__).parents[2]
# Turns end at every seventh token, so that a random model has several of them. The reward is one that any can raise.
ENVIRONMENT = '''
class Letters:
    """Two or three turns; the reward is the share of letters before n."""

    columns = ("reference",)

    def reset(self, row):
        self.said = []
        return [{"role": "user", "content": row["prompt"]}]

    def step(self, completion):
        self.said.append(completion)
        done = len(self.said) >= 2 + len(completion) % 2
        return [] if done else [{"role": "tool", "content": f"turn {len(self.said)}"}]

    def reward(self):
        text = "".join(self.said)
        return sum(letter < "n" for letter in text) / max(len(text), 1)


class Hangs(Letters):
    def step(self, completion):
        import time
        time.sleep(3600)


class NeedsMore(Letters):
    columns = ("reference", "answer")


class Raises(Letters):
    def step(self, completion):
        raise KeyError("no such thing")
'''


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    # Letters and most specials end no turn.
    monkeypatch.setattr(tokenizers, "_ends_of_turns", lambda tokenizer: set(range(3, tokenizer.vocab_size - 8, 7)))


def config_of(method, folder, name="Letters", functions=None, **overrides):
    path = folder / "environment.py"
    path.write_text(ENVIRONMENT)
    settings = {
        "rollout.environment": f"{path}:{name}", "rollout.max_completion_length": 96, "data.max_length": 256,
        "rollout.max_turns": 4,
    }  # fmt: skip
    if functions is None:
        settings["rewards.functions"] = None
    return online_config(method, folder, folder / "run", functions or "odd", **(settings | overrides))


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    """(run, state, step, the answers of a rollout with their rewards, passes, feed) with GRPO."""
    folder = tmp_path_factory.mktemp("environment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_ends_of_turns", lambda tokenizer: set(range(3, tokenizer.vocab_size - 8, 7)))
        config = config_of("grpo", folder, functions="odd", **(SGD | {"optim.learning_rate": 0.1}))
        with started(config, folder) as (run, graphdef, state, step):
            feed = method_of(config).feed(run, graphdef)
            batch = feed(state, 0)
            judged = feed._judged(state, 0)[0]
            yield run, state, step, judged, Passes(run, graphdef), feed, batch


def test_log_probabilities_of_later_turns_are_those_of_the_trainer(grpo):
    run, state, _, judged, passes, _, _ = grpo
    assert np.mean([one.episode.turns for one in judged.rollouts]) > 1.5
    packed = pack(run, judged.rollouts)
    own = packed.tokens_of(passes.policy_logps(state, packed.batch))
    compared = 0
    for one, logps in zip(judged.rollouts, own, strict=True):
        assert not one.sampled.all() and one.sampled[0] and not one.logprobs[~one.sampled].any()
        np.testing.assert_allclose(logps[one.sampled], one.logprobs[one.sampled], rtol=0, atol=1e-4)
        compared += int(one.sampled[np.argmin(one.sampled) :].sum())
    assert compared > 50  # of turns after the first


def test_tokens_that_were_not_sampled_are_not_trained(grpo):
    _, state, step, judged, _, _, batch = grpo
    weights_BS, targets_BS = np.asarray(batch.weights_BS), np.asarray(batch.targets_BS)
    trained = sorted(targets_BS[weights_BS > 0].tolist())
    assert trained == sorted(int(x) for one in judged.rollouts for x in one.tokens[one.sampled])
    # What they are as targets changes no bit of the update.
    other_BS = np.where(weights_BS > 0, targets_BS, (targets_BS + 7) % 100)
    assert (other_BS != targets_BS).any()
    (after, metrics), (same, others) = (
        step(state, batch._replace(targets_BS=jax.device_put(x, batch.targets_BS.sharding)))
        for x in (targets_BS, other_BS)
    )
    assert metrics["loss"] == others["loss"]
    leaves = [jax.tree.leaves(one.trainable) for one in (state, after, same)]
    for a, b in zip(*leaves[1:], strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(*leaves[:2], strict=True))


def test_the_reward_of_the_environment_and_those_of_functions_both_count(grpo):
    _, _, _, judged, _, feed, _ = grpo
    by_function = judged.by_function
    assert set(by_function) == {"odd", "environment"}
    np.testing.assert_allclose(judged.rewards, by_function["odd"] + by_function["environment"])
    metrics = feed.metrics(0)
    assert 1 < metrics["environment/turns"] <= 3 and 0 < metrics["environment/tool_calls"] <= 2
    assert metrics["environment/max_turns_ratio"] == 0 and metrics["environment/lost"] == 0
    assert metrics["rewards/environment/mean"] == pytest.approx(by_function["environment"].mean())


def test_later_rollouts_with_fewer_conversations_in_a_turn_decode_in_the_same_program(grpo):
    _, state, _, judged, _, feed, _ = grpo
    assert len({one.episode.turns for one in judged.rollouts}) > 1
    compiled = steps.decode._cache_size()
    judged = feed._judged(state, 1)[0]
    assert len({one.episode.turns for one in judged.rollouts}) > 1
    assert steps.decode._cache_size() == compiled


@pytest.mark.parametrize("name", methods_on("prompts"))
def test_every_method_that_learns_from_rewards_has_environments(name):
    method = find_method(name)
    assert method is not None and method.environments is online.environments


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [({"data.packing": False}, None), ({}, {"data": 2, "fsdp": 2, "tensor": 2})],
    ids=["unpacked", "devices"],
)
def test_how_a_batch_is_cut_changes_nothing(grpo, tmp_path, changes, sizes):
    run, state, step, _, _, _, batch = grpo
    after, metrics = step(state, batch)
    config = config_of("grpo", tmp_path, functions="odd", **(SGD | {"optim.learning_rate": 0.1} | changes))
    with started(config, run.folder, sizes=sizes) as (other, graphdef, other_state, other_step):
        other_batch = method_of(config).feed(other, graphdef)(other_state, 0)
        other_after, other_metrics = other_step(other_state, other_batch)
    # Answers that share a prompt have fewer tokens in all.
    for name in set(metrics) - {"sampling/sampling_logp_difference/max", "num_tokens"}:
        np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(after.trainable), jax.tree.leaves(other_after.trainable), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    ["grpo", pytest.param("rloo", marks=pytest.mark.slow), pytest.param("online_dpo", marks=pytest.mark.slow)],
)
def test_a_run_with_an_environment_alone_resumes_bit_for_bit(tmp_path, method):
    overrides = {"data.max_length": 512} if method == "online_dpo" else {}
    lines, summary = train_lose_the_end_and_resume(config_of(method, tmp_path, **overrides), tmp_path / "run")
    first = lines[0]
    assert first["reward"] == pytest.approx(first["rewards/environment/mean"]) and 0 < first["reward"] < 1
    if method != "online_dpo":
        assert first["sampling/sampling_logp_difference/max"] < 1e-4
    assert "eval_reward" in summary and any("eval_environment/turns" in line for line in metrics_of(tmp_path / "run"))
    whole, run = ((tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "run"))
    assert whole == run
    row = json.loads(run.splitlines()[0])
    sampled = [part["sampled"] for part in row["conversation"]]
    assert sampled == [i % 2 == 0 for i in range(2 * row["turns"] - 1)]
    assert any(
        "<|im_start|>tool\nturn 1<|im_end|>" in line["conversation"][1]["text"]
        for line in map(json.loads, run.splitlines())
        if line["turns"] > 1
    )


def test_answers_whose_environment_hangs_have_no_reward_and_are_counted(tmp_path):
    config = config_of("grpo", tmp_path, "Hangs", **{"rewards.timeout_seconds": 3.0})
    with started(config, tmp_path) as (run, graphdef, state, step):
        feed = method_of(config).feed(run, graphdef)
        _, metrics = step(state, feed(state, 0))
    assert metrics["skipped_updates"] == 1
    logged = feed.metrics(0)
    assert logged["environment/lost"] == logged["rewards/environment/timeouts"] == 8
    assert logged["rewards/environment/unscored"] == 8


def test_an_exception_stops_the_run_and_names_the_row(tmp_path):
    with started(config_of("grpo", tmp_path, "Raises"), tmp_path) as (run, graphdef, state, _):
        feed = method_of(run.config).feed(run, graphdef)
        with pytest.raises(
            EnvironmentFailure, match=r"rows.jsonl.*Raises of .* raised in step\(\)(.|\n)*no such thing"
        ):
            feed(state, 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rollout.environment": "calculater"}, "not a built-in environment"),
        ({"rollout.environment": None, "rollout.max_turns": 8}, "or set rollout.environment, which gives rewards"),
        ({"rollout.environment": None}, "rollout.max_turns=4 .*rollout.environment"),
        ({"rewards.functions": "package.rewards:environment"}, "has a function called 'environment'"),
    ],
)
def test_settings_are_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        set_up(config_of("grpo", tmp_path, **overrides))


@pytest.mark.parametrize(
    ("template", "name", "error", "message"),
    [
        (None, "NeedsMore", ConfigError, "needs 'answer', and the rows have no such column; they have reference"),
        ("{{ messages[-1]['content'] }}", "Letters", ConfigError, "it writes an earlier answer differently"),
        (
            "{% for m in messages %}{% if m.content.startswith('Colour') %}{{ raise_exception('not this') }}{% endif %}"
            "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "Letters",
            DataError,
            "rows.jsonl.*the chat template refuses these messages",
        ),
    ],
)
def test_templates_and_columns_are_refused_before_the_first_step(tmp_path, template, name, error, message):
    overrides = {}
    if template:
        (tmp_path / "template.jinja").write_text(template)
        overrides["data.chat_template"] = str(tmp_path / "template.jinja")
    config = config_of("grpo", tmp_path, name, **overrides)
    run = set_up(config)
    with pytest.raises(error, match=message), method_of(config).environments(config, run.data, run.tokenizer):
        pass


def test_the_example_of_the_documentation_is_the_shipped_file_and_works():
    path = ROOT / "configs" / "environments" / "shorten.py"
    code = path.read_text(encoding="utf-8")
    shown = textwrap.indent(code[code.index("class ") :], "    ", lambda line: line.strip())
    assert shown.strip() in (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    row = {"prompt": [{"role": "user", "content": "What is a glacier?"}], "most_words": 3, "index": 0}
    with Environments(f"{path}:Shorten", workers=1) as ours:
        ours.check(["most_words"], row, "a row")
        ours.reset([row], ["a row"])
        reply = {"role": "user", "content": "That has 4 words. Answer in 1 to 3 words."}
        assert ours.step({0: "Ice that moves slowly"}) == {0: (reply,)}
        assert ours.step({0: "Moving ice"}) == {0: ()}
        assert ours.rewards([0]) == {0: (pytest.approx(0.9), False)}


@pytest.mark.slow
def test_the_shipped_game_runs(tmp_path):
    overrides = {"output_dir": str(tmp_path / "run"), "rollout.max_completion_length": 160, "data.max_length": 640}
    config = load(f"{ROOT}/configs/smollm2_135m_guess_number.py:smoke", overrides)
    summary = api.train(config)
    lines = metrics_of(tmp_path / "run")
    assert "eval_reward" in summary and max(line.get("environment/turns", 0) for line in lines) > 1
    assert all("rewards/environment/mean" in line for line in lines if "loss" in line)
