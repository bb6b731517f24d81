"""A reward model as a reward: its scores, its memory, and whole runs that learn from it."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from online_runs import online_config, started
from pair_runs import config_of, evaluate_export, metrics_of, train_lose_the_end_and_resume, write_rows

from jaxft import api
from jaxft.adapters.attach import AdapterParam, merge
from jaxft.checkpoint.hf import write_config, write_weights
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.peft import write_adapter
from jaxft.data.chat.encode import encode
from jaxft.data.formats import Conversation
from jaxft.data.prompts import Prompt
from jaxft.errors import ConfigError
from jaxft.hardware.topology import parse
from jaxft.methods import method_of
from jaxft.methods.online.judge import Judge
from jaxft.methods.online.reward_model import AdapterArrays
from jaxft.planning.job import abstract_step_of, sharded_step_of
from jaxft.planning.shapes import shapes_of
from jaxft.rollouts.rollout import Rollout
from jaxft.runs.build import build_model
from jaxft.runs.train import set_up

TURNS = [("Colour 3?", "red, I think"), ("Which one?", "the second"), ("Colour 5?", "a"), ("7?", "blue")]
FORMS = ("adapter", "whole")


# Many answers of one token, which is the one that is judged.
LEARNS = {
    "rewards.missing_eos_penalty": 0.25,
    "rollout.max_completion_length": 1,
    "train.batch_size": 64,
    "optim.learning_rate": 0.05,
}


def arrays_of(folder):
    return jax.tree.leaves(nnx.state(load_model(folder).module))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Paths: a base; a reward model that is an adapter on it; the same, merged into a whole model."""
    parent = tmp_path_factory.mktemp("models")
    paths = {name: parent / name for name in ("base", *FORMS)}
    config = config_of("reward", write_rows(parent), parent / "run")
    made = build_model(config, random_base=paths["base"])
    tokenizer = api.load_tokenizer(str(paths["base"]))
    keys = iter(jax.random.split(jax.random.key(3), 100))
    own = nnx.state(made.module, AdapterParam)
    nnx.update(made.module, jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), own))
    write_adapter(made.module, str(paths["adapter"]), base=str(paths["base"]))
    loaded = load_model(str(paths["adapter"]))
    merge(loaded.module)
    paths["whole"].mkdir()
    write_weights(loaded.module, str(paths["whole"]))
    write_config(str(paths["whole"]), loaded.hf_config, dtype="float32")
    for form in FORMS:
        tokenizer.save(paths[form])
    return {name: str(path) for name, path in paths.items()}


def judged_config(folders, folder, form, **overrides):
    """A run of GRPO on the base, judged by a reward model alone."""
    own = {
        "model.path": folders["base"], "model.random_init": False, "rewards.functions": None, "rewards.workers": 2,
        "rewards.model": folders[form],
    }  # fmt: skip
    return online_config("grpo", folder, folder / "run", **own | overrides)


def answers_of(tokenizer):
    """TURNS as answers that were sampled token for token, in groups of one."""
    out = []
    for number, (question, answer) in enumerate(TURNS):
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        (one,) = encode(Conversation(row=0, where="", format="messages", messages=messages), tokenizer)
        start = int(one.mask.argmax())
        prompt = Prompt(
            tokens=one.tokens[:start], mask=np.zeros(start, np.uint8), row=number, messages=messages[:1],
            where=f"row {number}",
        )  # fmt: skip
        tokens = one.tokens[start:]
        out.append(
            Rollout(
                prompt=prompt, number=number, group=number, tokens=tokens, sampled=np.ones(len(tokens), bool),
                logprobs=np.zeros(len(tokens)), finish_reason="stop", text=answer,
            )
        )  # fmt: skip
    return out


def rows_of_turns():
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in TURNS
    ]


@pytest.fixture(scope="module")
def expected(folders):
    """The scores of TURNS by `jaxft.score`."""
    path = folders["adapter"]
    return np.array([one["score"] for one in api.score(load_model(path), api.load_tokenizer(path), rows_of_turns())])


@pytest.mark.parametrize(
    ("form", "sizes"),
    [("adapter", None), ("whole", None), ("adapter", {"data": 2, "fsdp": 2, "tensor": 2})],
    ids=["adapter", "whole", "devices"],
)
def test_scores_are_those_of_the_reward_model_and_the_base_is_held_once(folders, tmp_path, expected, form, sizes):
    overrides = {"rewards.model_weight": -2.0, "rewards.missing_eos_penalty": 0.5, "train.accumulation_steps": 2}
    config = judged_config(folders, tmp_path, form, **overrides)
    base = build_model(config).module
    with started(config, tmp_path, base=base, sizes=sizes) as (run, graphdef, state, _):
        rollouts = answers_of(run.tokenizer)
        judged = Judge(run, graphdef)(state, rollouts)
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(judged.by_function["reward_model"], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(judged.rewards, -2 * expected, rtol=1e-4, atol=2e-4)
        # The adapter of the trained model has no part in the score.
        moved = state._replace(trainable=jax.tree.map(lambda x: x + 0.1, state.trainable))
        again = Judge(run, graphdef)(moved, rollouts)
        np.testing.assert_array_equal(again.rewards, judged.rewards)
        held = sum(x.size for x in jax.tree.leaves(state.method.judge))
    sizes_of = {form: sum(x.size for x in arrays_of(folders[form])) for form in FORMS}
    base_size = sum(x.size for x in arrays_of(folders["base"]))
    head = load_model(folders["whole"]).module.config.hidden_size
    if form == "whole":
        assert held == sizes_of["whole"]
    else:
        assert isinstance(state.method.judge, AdapterArrays)
        assert held == sizes_of["adapter"] - (sizes_of["whole"] - head) < base_size / 2


def test_a_reward_model_with_another_template_reads_the_text(folders, tmp_path, expected):
    """And gives no score to a text that is longer than its positions."""
    other = tmp_path / "other"
    shutil.copytree(folders["whole"], other)
    tokenizer = api.load_tokenizer(str(other))
    tokenizer.backend.chat_template = "Judge this: " + tokenizer.chat_template
    assert tokenizer.backend.chat_template != api.load_tokenizer(folders["base"]).chat_template
    tokenizer.save(other)
    own = np.array([one["score"] for one in api.score(load_model(str(other)), tokenizer, rows_of_turns())])
    assert np.abs(own - expected).max() > 1e-3
    # What is judged ends before the template's newline.
    lengths = [len(tokenizer.encode(tokenizer.render(one["messages"]).rstrip())) for one in rows_of_turns()]
    limit = max(lengths) - 1
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": limit}))
    overrides = {"rewards.model": str(other), "data.max_length": limit, "rewards.missing_eos_penalty": 0.5}
    config = judged_config(folders, tmp_path, "whole", **overrides)
    with started(config, tmp_path, base=build_model(config).module) as (run, graphdef, state, _):
        judged = Judge(run, graphdef)(state, answers_of(run.tokenizer))
    too_long = np.array(lengths) == max(lengths)
    assert sorted(lengths)[-2] <= limit
    np.testing.assert_allclose(judged.rewards, np.where(too_long, np.nan, own), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["adapter", "whole"])
def test_a_run_learns_from_it_and_resumes_bit_for_bit(folders, tmp_path, form):
    config = judged_config(folders, tmp_path, form, **LEARNS)
    lines, summary = train_lose_the_end_and_resume(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    for row in rows:
        cut = 0.25 * (row["finish_reason"] == "length")
        assert row["reward"] == pytest.approx(row["rewards"]["reward_model"] - cut, abs=1e-12)
    sampled = [line["reward"] for line in lines]
    assert np.mean(sampled[3:]) > np.mean(sampled[:3]) + 0.1
    greedy = [line["eval_reward"] for line in metrics_of(tmp_path / "run") if "eval_reward" in line]
    assert greedy[-1] > greedy[0] + 1
    # The evaluation of the export holds the reward model with a base of its own.
    evaluated = evaluate_export(config)
    assert evaluated["eval_reward"] == pytest.approx(summary["eval_reward"], rel=1e-4, abs=1e-4)


def test_plans_count_what_is_held(folders, tmp_path):
    def method_bytes(form):
        config = judged_config(folders, tmp_path, form)
        abstract = abstract_step_of(config, shapes_of(config)[0], steps=6)
        assert not abstract.shapes.references
        return sharded_step_of(abstract, config, parse("h100:1", 1)).parts().method

    sizes = {form: sum(x.nbytes for x in arrays_of(folders[form])) for form in FORMS}
    assert method_bytes("whole") == sizes["whole"]
    head = 4 * load_model(folders["whole"]).module.config.hidden_size
    assert method_bytes("adapter") == sizes["adapter"] - (sizes["whole"] - head)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rewards.model": "base"}, "has no score head and gives no scores. Give a run with method.name='reward'"),
        ({"rewards.model": None}, "a reward model \\(rewards.model\\), or set rollout.environment"),
        ({"rewards.model": None, "rewards.model_weight": 2.0}, "rewards.model_weight"),
        ({"rewards.model_weight": 0.0}, "rewards.model_weight=0.0 must be a finite number other than 0"),
        ({"rewards.missing_eos_penalty": 0.0}, "rewards.missing_eos_penalty=0.0 must be above zero"),
    ],
    ids=["no head", "nothing", "weight alone", "weight of 0", "penalty of 0"],
)
def test_settings_that_it_cannot_judge_with_are_refused(folders, tmp_path, overrides, message):
    overrides = {name: folders.get(value, value) for name, value in overrides.items()}
    with pytest.raises(ConfigError, match=message):
        set_up(judged_config(folders, tmp_path, "adapter", **overrides))


def test_a_reward_model_that_is_too_short_is_refused(folders, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(folders["whole"], short)
    fields = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 32}))
    with pytest.raises(ConfigError, match="data.max_length=64 is beyond the 32 positions of rewards.model="):
        set_up(judged_config(folders, tmp_path, "whole", **{"rewards.model": str(short)}))


def open_judges(config):
    """What a run does with its reward functions and its environment before it loads weights."""
    method, tokenizer = method_of(config), api.load_tokenizer(config.model.path)
    data = method.prepare(config, tokenizer)
    with method.rewards(config, data), method.environments(config, data, tokenizer):
        pass


@pytest.fixture
def with_template(folders, tmp_path):
    """A function of a chat template, or None: the path of a copy of the adapter with that template."""

    def copy(template):
        folder = tmp_path / "other"
        shutil.copytree(folders["adapter"], folder)
        tokenizer = api.load_tokenizer(str(folder))
        tokenizer.backend.chat_template = template
        (folder / "chat_template.jinja").unlink()
        tokenizer.save(folder)
        assert api.load_tokenizer(str(folder)).chat_template == template
        return str(folder)

    return copy


def test_a_reward_model_that_cannot_render_the_prompts_is_refused(folders, tmp_path, with_template):
    prompts = [{"prompt": [{"role": "user", "content": f"Colour {n}?"}], "reference": "1"} for n in range(12)]
    rows = write_rows(tmp_path, prompts, "chats.jsonl")
    overrides = {"rewards.model": with_template(None), "data.train": rows, "data.eval": rows}
    config = judged_config(folders, tmp_path, "adapter", **overrides)
    with pytest.raises(ConfigError, match="line 1 is a prompt of messages, but .* Put a chat_template.jinja into its"):
        open_judges(config)


def test_an_environment_with_a_reward_model_of_another_template_is_refused(folders, tmp_path, with_template):
    template = "Judge this: " + api.load_tokenizer(folders["base"]).chat_template
    overrides = {"rewards.model": with_template(template), "rollout.environment": "guess_number"}
    with pytest.raises(ConfigError, match="without what rollout.environment says between them. Give a reward model"):
        open_judges(judged_config(folders, tmp_path, "adapter", **overrides))


def test_a_reward_function_cannot_take_the_name_of_the_reward_model(folders, tmp_path):
    path = tmp_path / "named.py"
    path.write_text("def reward_model(completions):\n    return [0.0] * len(completions)\n")
    with pytest.raises(
        ConfigError, match="a function called reward_model, which is the name of rewards.model in metrics: rename"
    ):
        open_judges(judged_config(folders, tmp_path, "adapter", **{"rewards.functions": str(path) + ":reward_model"}))
