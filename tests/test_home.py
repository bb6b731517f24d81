"""`~` is the home folder wherever a path is taken: in every field of a config and every public function."""

import inspect
import re

import pytest

from jaxft import api, cli
from jaxft.checkpoint.load import base_of, resolve
from jaxft.config import RunConfig, with_overrides
from jaxft.config.fields import all_fields
from jaxft.data.sources import open_rows
from jaxft.doctor.storage import examine_output
from jaxft.errors import ExitCode, JaxftError
from jaxft.files.digest import content_digest
from jaxft.hardware.prices import price_of
from jaxft.home import local_path
from jaxft.rollouts.environments.named import named_environment
from jaxft.rollouts.reward_functions.named import named_functions
from jaxft.runs.folder import chat_template, run_config

# Texts that may hold several paths; what opens them expands each.
LISTS = {"data.train", "data.eval", "data.mixture.NAME.path", "rewards.functions"}
# Texts whose meaning speaks of files or folders, without being a path.
NO_PATHS = {"data.rows_field", "model.revision"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_home_folders_are_expanded_and_addresses_are_not(home):
    assert local_path("~/rows.jsonl") == f"{home}/rows.jsonl" and local_path("~") == str(home)
    assert [local_path(path) for path in ("hf://~/x", "gs://a/~", "a~", "")] == ["hf://~/x", "gs://a/~", "a~", ""]


def test_every_field_with_a_path_expands_it(home):
    texts = {key: field for key, field in all_fields(RunConfig).items() if field.base is str and not field.choices}
    about_paths = re.compile(r"folder|\bfile|FILE|\bpath\b|model\.path|data\.train`")
    speaking = {key for key, field in texts.items() if about_paths.search(field.meaning)} - NO_PATHS
    marked = {key for key, field in texts.items() if field.is_path}
    assert speaking <= marked | LISTS, "mark them as PATH, or enter them into a table above"
    assert len(marked) >= 7
    for key in marked:
        assert texts[key].convert("~/x") == f"{home}/x"
    config = with_overrides({"model.path": "~/m", "output_dir": "~/runs/a", "data.train": "~/a.jsonl"})
    assert (config.model.path, config.output_dir) == (f"{home}/m", f"{home}/runs/a")


def test_what_opens_lists_of_paths_expands_each(home):
    for name in ("a.jsonl", "b.jsonl"):
        (home / name).write_text("{}")
    assert len(open_rows("~/a.jsonl, ~/b.jsonl")) == len(open_rows("~/*.jsonl")) == len(open_rows("~")) == 2
    (home / "r.py").write_text("def one(completions, **_): return [0.0]\n")
    (named,) = named_functions("~/r.py:one=2")
    assert named.source == str(home / "r.py")


# A call of each public function that takes a path, which refuses one that is not there by its expanded name.
CALLS = {
    ("export", "source"): lambda: api.export("~/none", "~/out"),
    ("export", "to"): lambda: api.export("~/none", "~/full"),
    ("compare", "to"): lambda: api.compare(to="~/full/file", runs=("~/full",)),
    ("convert", "source"): lambda: api.convert("~/none", "~/out"),
    ("convert", "to"): lambda: api.convert("~/none", "~/full"),
    ("load_model", "path"): lambda: api.load_model("~/none"),
    ("load_tokenizer", "path"): lambda: api.load_tokenizer("~/none"),
    ("score", "rows"): lambda: open_rows("~/none"),
    ("plan", "prices"): lambda: price_of("v5e", "~/none"),
    ("digest", "paths"): lambda: content_digest("~/none"),
    ("run", "folder"): lambda: run_config("~/none"),
    ("environment", "text"): lambda: named_environment(with_overrides({"model.path": "m", "data.train": "x"} | {
        "method.name": "grpo", "rewards.functions": "exact_match", "rollout.environment": "~/none.py:C"
    }).rollout.environment),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=map("-".join, CALLS))
def test_public_functions_name_the_expanded_path(home, call):
    (home / "full").mkdir()
    (home / "full" / "file").touch()
    with pytest.raises((JaxftError, OSError), match=rf"{home}/(none|full)"):
        call()


# What each command is given, and refuses by its expanded name before it loads anything.
COMMANDS = {
    ("train", "config"): "--config=~/none.yaml",
    ("data", "set_model"): "--model=~/none --data=x",
    ("data", "config"): "--config=~/none.py",
    ("data", "write"): "--data=~/full/file --deep --write=~/full/file",
    ("eval", "run"): "--run=~/none",
    ("eval", "model"): "--model=~/none --eval_data=x",
    ("export", "run"): "--run=~/none --to=x",
    ("export", "model"): "--model=~/none --to=x",
    ("export", "to"): "--model=x --to=~/full",
    ("compare", "run"): "--run=~/none --to=x",
    ("compare", "prompts"): "--config=quickstart:smoke --ways=zero --prompts=~/none --to=~/answers",
    ("generate", "model"): "--model=~/none --prompt=x",
    ("chat", "model"): "--model=~/none",
    ("score", "model"): "--model=~/none --data=x",
    ("lm-eval", "include_path"): "--model=x --tasks=x --include_path=~/none",
    ("lm-eval", "output"): "--model=x --tasks=x --output=~/full/file",
    ("convert", "source"): "~/none x",
    ("convert", "target"): "x ~/full",
    ("runs", "folder"): "~/none",
    ("verify", "path"): "~/none",
    ("serve", "state"): "keys list --state=~/full",
    ("serve", "tls_cert"): "--model=a=~/full --state=x --tls_cert=~/none --tls_key=~/full/file",
    ("serve", "tls_key"): "--model=a=~/full --state=x --tls_cert=~/full/file --tls_key=~/none",
}


@pytest.mark.parametrize(("command", "text"), COMMANDS.items(), ids=map("-".join, COMMANDS))
def test_options_are_expanded(home, capsys, command, text):
    (home / "full").mkdir()
    (home / "full" / "file").touch()
    assert cli.main([command[0], *text.split()]) == ExitCode.REFUSED
    assert re.search(rf"{home}/(none|full)", capsys.readouterr().err)


def test_no_option_with_a_path_is_forgotten():
    (verbs,) = (action for action in cli.make_parser()._actions if action.choices)
    paths = re.compile(r"PATH|FILE|FOLDER|SRC|DST|ROWS|NAME\[:ARG\]")
    taken = {
        (verb, action.dest)
        for verb, parser in verbs.choices.items()
        for action in parser._actions
        if paths.fullmatch(str(action.metavar))
    }
    # The same code as in a command above, or a function of the first table reads them.
    others = {
        "config", "set_data", "set_eval_data", "set_output", "set_chat_template", "set_model", "chat_template", "model",
        "reward_model", "prices", "data", "to", "pairs", "base", "set_base", "tokenizer", "output_dir",
    }  # fmt: skip
    assert {(verb, dest) for verb, dest in taken if dest not in others} <= set(COMMANDS)


def test_a_folder_that_is_examined_is_expanded(home):
    (home / "file").touch()
    values = [part.value for part in examine_output("~/file") if part.name == "output_dir"]
    assert values == [f"{home}/file"]


def test_the_base_of_an_adapter_is_expanded(home):
    (home / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(JaxftError, match=rf"the base model '{home}/none', which is not there"):
        base_of(str(home), "~/none")


def test_paths_that_are_read_without_an_error(home):
    assert resolve("~/model") == f"{home}/model"
    (home / "chat_template.jinja").write_text("{{ messages }}")
    assert chat_template("~") == "{{ messages }}"


def test_no_public_function_with_a_path_is_forgotten():
    known = {"path", "source", "to", "prices", "rows", "folder", "folders", "pairs", "path_with_arg"}
    functions = [getattr(api, name) for name in dir(api) if inspect.isfunction(getattr(api, name))]
    taken = {(f.__name__, name) for f in functions for name in inspect.signature(f).parameters if name in known}
    # Opened by functions that are called above: `resolve`, and the paths that `export` and `sample` write to.
    others = {
        ("load_adapters", "folders"), ("write_named", "folder"), ("sample", "to"), ("sample", "pairs"),
        ("get_config", "path_with_arg"),
    }  # fmt: skip
    assert taken - others <= set(CALLS)
