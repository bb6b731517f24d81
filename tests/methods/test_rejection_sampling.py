"""Rejection sampling into files: the best answers, resumed where it stopped, read by the methods that follow."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from online_runs import PROMPTS, online_config
from pair_runs import config_of

from jaxft import api, cli
from jaxft.checkpoint.hf import write_config, write_weights
from jaxft.checkpoint.load import load_model
from jaxft.errors import ConfigError, ModelError
from jaxft.methods import method_of
from jaxft.rollouts.sample import Sampler, seed_of
from jaxft.rollouts.selection import Selection
from jaxft.runs.build import build_model

WHOLE = {"keep_cut": True}  # a model with drawn weights hardly ever stops


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """(folder, config, model, tokenizer, summary of a call that wrote best.jsonl and pairs.jsonl)."""
    folder = tmp_path_factory.mktemp("sampled")
    config = online_config("grpo", folder, folder / "run", **{"rollout.slots": 4})
    model = build_model(config, random_base=folder / "base")
    tokenizer = api.load_tokenizer(config.model.path)
    summary = api.sample(
        model, tokenizer, config, str(folder / "best.jsonl"), pairs=str(folder / "pairs.jsonl"), **WHOLE
    )
    return folder, config, model, tokenizer, summary


@pytest.fixture(scope="module")
def drawn(sampled):
    """The answers to all prompts, drawn by one call, and their rewards, counted here."""
    _, config, model, tokenizer, _ = sampled
    prompts = method_of(config).prepare(config, tokenizer).train_examples
    sampler = Sampler(tokenizer=tokenizer, group=4, max_completion_length=12, length=64, slots=4)
    rollouts = sampler.sample(model.module, prompts, temperature=1.0, seed=seed_of(config.seed, 0))
    rewards = np.array([np.mean([token % 2 for token in one.tokens]) for one in rollouts])
    return rollouts, rewards


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_answers_are_those_of_one_call_for_all_prompts(sampled, drawn):
    folder, _, _, _, summary = sampled
    rollouts, rewards = drawn
    rows, pairs = lines_of(folder / "best.jsonl"), lines_of(folder / "pairs.jsonl")
    groups = rewards.reshape(12, 4)
    assert [row["row"] for row in rows] == list(range(12))
    for number, row in enumerate(rows):
        best = int(np.argmax(groups[number]))
        assert row["prompt"] == PROMPTS[number]["prompt"]
        assert row["completion"] == rollouts[number * 4 + best].text
        assert row["reward"] == row["rewards"]["odd"] == groups[number, best]
    different = np.flatnonzero(groups.max(1) != groups.min(1))
    assert [pair["row"] for pair in pairs] == different.tolist()
    for pair, number in zip(pairs, different, strict=True):
        assert pair["chosen"] == rollouts[number * 4 + int(np.argmax(groups[number]))].text
        assert pair["rejected"] == rollouts[number * 4 + int(np.argmin(groups[number]))].text
        assert (pair["score_chosen"], pair["score_rejected"]) == (groups[number].max(), groups[number].min())
    assert summary["mean_reward"] == pytest.approx(rewards.mean())
    assert summary["answers"] == 48 and summary["rows"] == 12 and summary["prompts_with_a_row"] == 1.0
    assert summary["tokens"] == sum(len(one.tokens) for one in rollouts)
    assert summary["pairs"] == len(different) and summary["ties"] == 12 - len(different)


def test_an_interrupted_call_goes_on_and_writes_the_same_bytes(sampled, tmp_path):
    folder, config, model, tokenizer, whole = sampled
    to, pairs = tmp_path / "best.jsonl", tmp_path / "pairs.jsonl"
    said = []

    def interrupt(line):
        said.append(line)
        if len(said) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.sample(model, tokenizer, config, str(to), pairs=str(pairs), print_line=interrupt, **WHOLE)
    unfinished = tmp_path / "best.jsonl.jaxft.partial"
    assert not to.exists() and len(lines_of(unfinished)) == 1 + 8
    with open(unfinished, "a", encoding="utf-8") as file:
        file.write('{"rows": [{"prompt": "half')
    other = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, temperature=0.5))
    with pytest.raises(ConfigError, match=r"other settings \(rollout.temperature: was 1.0, now 0.5\)"):
        api.sample(model, tokenizer, other, str(to), pairs=str(pairs), **WHOLE)
    summary = api.sample(model, tokenizer, config, str(to), pairs=str(pairs), print_line=said.append, **WHOLE)
    assert said[2] == "going on after 8 of 12 prompts" and not unfinished.exists()
    assert to.read_bytes() == (folder / "best.jsonl").read_bytes()
    assert pairs.read_bytes() == (folder / "pairs.jsonl").read_bytes()
    assert {name: summary[name] for name in summary if "file" not in name} == {
        name: whole[name] for name in whole if "file" not in name
    }


def test_what_is_written_is_read_by_fine_tuning_and_by_dpo(sampled, tmp_path):
    folder, _, _, tokenizer, summary = sampled
    sft = config_of("sft", str(folder / "best.jsonl"), tmp_path / "sft")
    data = method_of(sft).prepare(sft, tokenizer)
    assert len(data.train_examples) == 12 and data.examination.formats == {"prompt_completion": 12}
    dpo = config_of("dpo", str(folder / "pairs.jsonl"), tmp_path / "dpo")
    assert len(method_of(dpo).prepare(dpo, tokenizer).train_examples) == summary["pairs"]


def test_all_good_answers_are_kept_once(drawn):
    rollouts, _ = drawn
    own = [*rollouts[:4], rollouts[1]]
    given = np.array([0.2, 0.9, np.nan, 0.7, 0.9])
    kept = Selection(keep="all", threshold=0.7, keep_cut=True)
    assert kept.kept(own, given) == [1, 3]
    assert kept.pair(own, given) == (1, 0)
    assert kept.pair(own, np.full(5, 0.5)) is None
    assert Selection(threshold=0.95, keep_cut=True).kept(own, given) == []
    assert all(one.finish_reason == "length" for one in own)
    assert Selection().kept(own, given) == [] and Selection().pair(own, given) is None


def test_messages_and_a_reward_model(sampled, tmp_path):
    folder, config, model, tokenizer, _ = sampled
    reward_model = load_model(str(folder / "base"), head="score")
    weight = reward_model.module.value.weight
    weight.set_value(jax.random.normal(jax.random.key(1), weight.get_value().shape))
    rows = [{"messages": [{"role": "user", "content": f"Colour {n}?"}]} for n in range(2)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train=str(path), eval=None),
        rewards=dataclasses.replace(config.rewards, functions=None),
    )
    to = tmp_path / "best.jsonl"
    summary = api.sample(model, tokenizer, config, str(to), reward_model=reward_model, **WHOLE)
    written = lines_of(to)
    assert summary["rows"] == 2 and [row["prompt"] for row in written] == [row["messages"] for row in rows]
    scored = api.score(reward_model, tokenizer, written)
    for row, one in zip(written, scored, strict=True):
        assert row["completion"][0]["role"] == "assistant"
        assert row["rewards"] == {"reward_model": row["reward"]}
        # The answer is scored as it was sampled, and here as its text is tokenised.
        assert row["reward"] == pytest.approx(one["score"], abs=1e-4)
    # The config can name the reward model too, with a weight, and with a penalty for answers that were cut off.
    whole = tmp_path / "reward"
    whole.mkdir()
    write_weights(reward_model.module, str(whole))
    write_config(str(whole), reward_model.hf_config, dtype="float32")
    tokenizer.save(whole)
    rewards = dataclasses.replace(config.rewards, model=str(whole), model_weight=2.0, missing_eos_penalty=0.5)
    api.sample(model, tokenizer, dataclasses.replace(config, rewards=rewards), str(tmp_path / "other.jsonl"), **WHOLE)
    for row, other in zip(written, lines_of(tmp_path / "other.jsonl"), strict=True):
        assert other["completion"] == row["completion"]
        assert other["reward"] == pytest.approx(2 * row["reward"] - 0.5, abs=1e-4)


def test_what_cannot_be_sampled_is_refused(sampled, tmp_path):
    folder, config, model, tokenizer, _ = sampled
    to = str(tmp_path / "new.jsonl")
    with pytest.raises(ConfigError, match="best.jsonl is there already.*--overwrite"):
        api.sample(model, tokenizer, config, str(folder / "best.jsonl"), **WHOLE)
    with pytest.raises(ConfigError, match="keep='all' keeps every answer .* threshold is None: give one"):
        api.sample(model, tokenizer, config, to, keep="all")
    with pytest.raises(ConfigError, match="keep='worst' is not one of best, all"):
        api.sample(model, tokenizer, config, to, keep="worst")
    without = dataclasses.replace(config, rewards=dataclasses.replace(config.rewards, functions=None))
    with pytest.raises(ConfigError, match="nothing judges the answers: set rewards.functions"):
        api.sample(model, tokenizer, without, to)
    several = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, environment="calculator"))
    with pytest.raises(ConfigError, match="rollout.environment='calculator' makes answers of several turns"):
        api.sample(model, tokenizer, several, to)
    sft = config_of("sft", str(folder / "rows.jsonl"), tmp_path / "sft")
    with pytest.raises(ConfigError, match="method.name='sft' does not sample answers.*Set method.name='grpo'"):
        api.sample(model, tokenizer, sft, to)
    with pytest.raises(ModelError, match="which has no score head"):
        api.sample(model, tokenizer, config, to, reward_model=model)
    with pytest.raises(ConfigError, match="rows and pairs cannot both be written"):
        api.sample(model, tokenizer, config, to, pairs=to)
    with pytest.raises(ConfigError, match="is no folder, so .* cannot be written"):
        api.sample(model, tokenizer, config, str(tmp_path / "no" / "new.jsonl"))


def test_the_command(sampled, tmp_path, capsys):
    folder, config, _, _, _ = sampled
    file = tmp_path / "config.py"
    file.write_text(
        "from jaxft.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        "    config.method.name = 'grpo'\n    return config\n"
    )
    given = {
        "model.path": folder / "base", "data.train": folder / "rows.jsonl", "data.max_length": 64,
        "data.prompt_field": "prompt", "rewards.functions": config.rewards.functions, "rewards.workers": 1,
        "rollout.num_generations": 4, "rollout.max_completion_length": 12, "rollout.slots": 4, "seed": config.seed,
        "model.dtype": "float32", "output_dir": tmp_path / "run", "data.truncation": "refuse",
    }  # fmt: skip
    overrides = [f"--config.{key}={value}" for key, value in given.items()]
    command = ["sample", f"--config={file}", f"--to={tmp_path / 'best.jsonl'}", "--json", *overrides]
    assert cli.main([*command, "--threshold=2"]) == 2
    assert "no answer was kept: of 48 answers 47 were cut off" in capsys.readouterr().err
    (tmp_path / "best.jsonl.jaxft.partial").unlink()
    assert cli.main([*command, "--keep_cut"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 12
    # On all eight devices.
    assert (tmp_path / "best.jsonl").read_bytes() == (folder / "best.jsonl").read_bytes()
