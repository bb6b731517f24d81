"""Scores of rows and the best of several answers, as functions and as commands."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from rich.console import Console

import jaxft
from jaxft import cli
from jaxft.assets import ASSETS
from jaxft.checkpoint.hf import write_config, write_weights
from jaxft.checkpoint.load import load_model, random_model
from jaxft.checkpoint.merged import MergedSource
from jaxft.checkpoint.tensors import SafetensorsFolder
from jaxft.config import MeshConfig
from jaxft.conversion.convert import convert
from jaxft.data.chat.encode import encode
from jaxft.data.formats import Conversation
from jaxft.errors import ConfigError, DataError, ExportError, ModelError
from jaxft.runs.build import abstract_model, build_model, make_tx, start_state
from jaxft.runs.export import write
from jaxft.runs.rewards import _document
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.trees import flatten

PAIRS = [json.loads(line) for line in (ASSETS / "smoke" / "pairs.jsonl").read_text().splitlines()][:7]


@pytest.fixture(scope="module")
def tokenizer():
    return jaxft.load_tokenizer(str(ASSETS / "smoke"))


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """(a language model, a reward model made of it)."""
    language, reward = tmp_path_factory.mktemp("lm"), tmp_path_factory.mktemp("rm")
    drawn = random_model(str(ASSETS / "smoke"), seed=0, dtype="float32", param_dtype="float32")
    write_weights(drawn.module, str(language))
    write_config(str(language), drawn.hf_config, dtype="float32")
    tokenizer.save(language)
    made = load_model(str(language), head="score")
    weight = made.module.value.weight
    weight.set_value(jax.random.normal(jax.random.key(1), weight.get_value().shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxft.checkpoint.verify.PEER_LIMIT", 0)
        write(made, tokenizer, reward, format="merged")
    return str(language), str(reward)


@pytest.fixture(scope="module")
def models(folders):
    return tuple(load_model(folder) for folder in folders)


def alone(model, tokenizer, messages):
    """The score of one conversation in a row of its own."""
    conversation = Conversation(row=0, where="row 0", format="messages", messages=tuple(messages))
    (example,) = encode(conversation, tokenizer)
    return float(model.scores([example.tokens])[0])


def test_packed_scores_are_those_of_rows_alone(models, tokenizer):
    scored = jaxft.score(models[1], tokenizer, PAIRS, batch_size=2)
    assert [one["row"] for one in scored] == list(range(7))
    for one, pair in zip(scored, PAIRS, strict=True):
        for side in ("chosen", "rejected"):
            expected = alone(models[1], tokenizer, [*pair["prompt"], *pair[side]])
            assert one[side] == pytest.approx(expected, abs=1e-4)
        assert one["right"] == (one["chosen"] > one["rejected"])
    rows = [{"messages": [*pair["prompt"], *pair["chosen"]]} for pair in PAIRS]
    answers = jaxft.score(models[1], tokenizer, rows, limit=4)
    np.testing.assert_allclose([one["score"] for one in answers], [one["chosen"] for one in scored[:4]], atol=1e-4)


def test_eight_devices_equal_one(folders, models, tokenizer):
    spread = load_model(folders[1], mesh=make_mesh_plan(MeshConfig(data=2, tensor=2)))
    scored = [jaxft.score(model, tokenizer, PAIRS) for model in (models[1], spread)]
    for one, other in zip(*scored, strict=True):
        assert other["chosen"] == pytest.approx(one["chosen"], abs=1e-4)
        assert other["rejected"] == pytest.approx(one["rejected"], abs=1e-4)


def test_the_score_verb(folders, tmp_path, capsys):
    rows, to = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    command = ["score", f"--model={folders[1]}", f"--data={rows}"]
    assert cli.main([*command, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    right = [one["right"] for one in summary["scores"]]
    assert summary["pairs"] == 7 and summary["accuracy"] == pytest.approx(sum(right) / 7)
    assert cli.main([*command, f"--to={to}"]) == 0
    assert "pairs 7  accuracy 0." in capsys.readouterr().err
    assert [json.loads(line) for line in to.read_text().splitlines()] == summary["scores"]
    assert cli.main(["score", f"--model={folders[0]}", f"--data={rows}"]) == 2
    assert "is a language model, which has no score head" in capsys.readouterr().err


def test_the_best_of_several_answers(models, tokenizer):
    prompts = [[{"role": "user", "content": "One?"}], "Two and"]
    language, reward = models
    best = jaxft.best_of(language, tokenizer, reward, prompts, n=3, max_new_tokens=6, seed=4)
    for one, prompt in zip(best, prompts, strict=True):
        assert len(set(one.texts)) == 3 and one.score == max(one.scores)
        assert one.text == one.texts[one.scores.index(one.score)]
        documents = [_document(tokenizer, prompt, text) for text in one.texts]
        np.testing.assert_allclose(reward.scores(documents), one.scores, atol=1e-4)
    # As the reward model reads a row of it.
    messages = [*prompts[0], {"role": "assistant", "content": "An answer"}]
    (example,) = encode(Conversation(row=0, where="row 0", format="messages", messages=tuple(messages)), tokenizer)
    assert _document(tokenizer, prompts[0], "An answer") == example.tokens.tolist()


def test_generate_takes_a_reward_model(folders, capsys):
    command = ["generate", f"--model={folders[0]}", "--prompt=one", "--max_new_tokens=5", "--json", "--temperature=1"]
    assert cli.main([*command, "--best_of=2", f"--reward_model={folders[1]}"]) == 0
    out = json.loads(capsys.readouterr().out)
    (candidates,) = out["candidates"]
    assert len(candidates) == 2 and out["scores"] == [max(one["score"] for one in candidates)]
    assert cli.main([*command, "--best_of=2"]) == 2
    assert "--best_of=N and --reward_model=PATH belong together" in capsys.readouterr().err


def config_of(folder, method):
    rows = str(ASSETS / "smoke" / "pairs.jsonl")
    changes = {"method.name": method, "model.path": folder, "model.random_init": False, "eval.metric": None}
    return jaxft.get_config("configs/quickstart.py:smoke", changes | {"data.train": rows, "data.eval": rows})


def test_a_reward_model_is_trained_further_by_its_own_method_only(folders, models):
    with pytest.raises(ConfigError, match="is a reward model: it has a score head in place of the LM head that method"):
        abstract_model(config_of(folders[1], "sft"))
    further = build_model(config_of(folders[1], "reward")).module
    np.testing.assert_array_equal(further.value.weight.get_value(), models[1].module.value.weight.get_value())
    assert not np.any(build_model(config_of(folders[0], "reward")).module.value.weight.get_value())


def test_evaluation_wants_the_head_of_the_method(folders, models, tokenizer):
    for model, method, own in ((models[0], "reward", "vocabulary"), (models[1], "dpo", "score")):
        with pytest.raises(ConfigError, match=f"method.name='{method}' evaluates .* has a {own} head"):
            jaxft.evaluate(model, tokenizer, config_of(folders[0], method))


def test_a_reward_model_has_no_gguf_file(folders, tmp_path):
    with pytest.raises(ExportError, match="a reward model has a score head in place of the LM head, and jaxft has no"):
        convert(folders[1], str(tmp_path / "model.gguf"), console=Console(quiet=True))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"task_type": "SEQ_CLS", "peft_type": "LORA"}')
    with pytest.raises(ModelError, match="adapter of a reward model, whose base has no score head. Merge it with"):
        MergedSource(SafetensorsFolder(folders[0]), adapter)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "muon", "adafactor", "apollo", "lion"])
def test_every_kind_of_optimizer_trains_a_score_head(folders, optimizer):
    """It is a vector, whose state is float32 and split like it."""
    config = config_of(folders[0], "reward")
    config = dataclasses.replace(
        config,
        adapter=dataclasses.replace(config.adapter, kind="none"),
        optim=dataclasses.replace(config.optim, name=optimizer),
    )
    tx = make_tx(config, abstract_model(config), lambda step: 1e-3)
    _, state = start_state(config, build_model(config).module, tx)
    key = jax.random.key(0)
    grads = jax.tree.map(lambda x: jax.random.normal(key, x.shape), state.trainable)
    updates, _ = tx.update(grads, state.opt_state, state.trainable)
    moved = flatten(updates)[0]["value/weight"]
    assert moved.shape == (64,) and np.all(np.isfinite(moved)) and np.any(moved)


def test_what_cannot_be_scored_is_refused(models, tokenizer):
    language, reward = models
    with pytest.raises(ModelError, match="is a language model, which has no score head"):
        jaxft.score(language, tokenizer, PAIRS)
    with pytest.raises(ModelError, match="reward model: it has a score head .* so it generates nothing"):
        jaxft.generate(reward, tokenizer, ["one"])
    with pytest.raises(DataError, match="there is nothing to score"):
        jaxft.score(reward, tokenizer, [])
    with pytest.raises(DataError, match=r"row 0 \(.*\)\. Shorten or remove them"):
        jaxft.score(reward, tokenizer, [{"prompt": "a", "completion": " b" * 9000}])
    for n, temperature, message in ((1, 1.0, "draw 2 or more"), (2, 0.0, "temperature=0 takes the most probable")):
        with pytest.raises(ConfigError, match=message):
            jaxft.best_of(language, tokenizer, reward, ["one"], n=n, temperature=temperature)
