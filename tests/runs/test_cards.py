"""Model cards of exports, and the command that repeats a run: what they say, and what they keep to themselves."""

import dataclasses
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import EvalResult
from scipy.stats import binomtest

from jaxft.checkpoint import manifest
from jaxft.checkpoint.hub.base import BaseFacts, base_facts
from jaxft.checkpoint.hub.card import MARK, Card, Result, markdown_code, write_card
from jaxft.cli import settings
from jaxft.config import RunConfig, load, with_overrides
from jaxft.files.run_folder import DATA, METRICS, SCORES
from jaxft.runs.cards import run_card
from jaxft.runs.cards.command import changed_fields, command_of, public_text
from jaxft.runs.identity.record import Record, write_record

SETTINGS = {
    "model.path": "/home/someone/models/Some-1B", "data.train": '["hf://owner/rows", "/home/someone/more, rows.jsonl"]',
    "data.eval": "~/held.jsonl", "output_dir": "/home/someone/runs/a b", "train.steps": 4, "optim.clip_norm": None,
    "data.packing": False, "adapter.rank_pattern": r"layers\.\d+\.q_proj:8", "optim.learning_rate": 1e-05,
    "data.chat_template_kwargs": {"enable_thinking": False, "name": "it's"}, "eval.metric": "json_exact",
}  # fmt: skip
MIXTURE = {"a": {"path": "a.jsonl", "weight": 2.0}, "b": {"path": "b.jsonl", "max_epochs": 3.0}}


def parsed(command: str) -> RunConfig:
    """The config that a shell and `jaxft train` make of a command."""
    import shlex

    words = shlex.split(command)
    assert words[:2] == ["jaxft", "train"]
    from jaxft import cli

    arguments, rest = cli.make_parser().parse_known_args(settings.underscored(words[1:]))
    overrides = settings.read_overrides(rest, arguments.options, "train", takes_config=True)
    return load(None, settings.with_flags(arguments, overrides))


@pytest.mark.parametrize(
    "config",
    [
        with_overrides(SETTINGS),
        with_overrides(
            {"model.path": "m", "data.mixture": MIXTURE, "adapter.kind": "none", "output_dir": "runs/unnamed"}
        ),
        load("llama3_1_8b_grpo"),
        load("smollm2_135m_mixture"),
    ],
    ids=["settings", "mixture", "grpo", "shipped"],
)
def test_the_command_repeats_the_run(config):
    assert parsed(command_of(config)) == config


def test_what_is_made_public_has_no_folder_of_this_machine():
    config = with_overrides(SETTINGS)
    command = command_of(config, public=True)
    assert "someone" not in command and "output" not in command and "~" not in command
    assert changed_fields(config, public=True)["adapter.rank_pattern"] == r"layers\.\d+\.q_proj:8"
    assert "hf://owner/rows" in command
    assert public_text(r"C:\Users\someone\rows.jsonl") == "rows.jsonl"
    assert public_text("/a/b/rewards.py:exact,/c/d.py:brief=0.2") == "rewards.py:exact,d.py:brief=0.2"
    assert public_text("https://x/y", is_path=False) == "https://x/y" and public_text("/x/y", is_path=False) == "y"


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run folder without weights."""
    folder = tmp_path / "my-run"
    config = dataclasses.replace(with_overrides(SETTINGS), output_dir=str(folder))
    (folder / "checkpoints" / "4").mkdir(parents=True)
    manifest.write(folder / "checkpoints" / "4")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    reads = {"data.train": {"path": "/home/someone/rows.jsonl", "digest": "ab" * 32, "examples": 7, "tokens": 90}}
    write_record(folder, Record(steps=4, reads=reads))
    examined = {"rows": 7, "tokens": 90, "trained_tokens": 30, "eval": {"rows": 120}}
    (folder / DATA).write_text(json.dumps(examined))
    last = {"step": 4, "eval_loss": 1.5, "eval_seconds": 3.0}
    rows = [{"step": 2, "eval_loss": 2.5}, {"step": 4, "loss": 1.0}, last]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {
        "metric": "json_exact",
        "base": {"correct": 3, "total": 120, "value": 0.025},
        "tuned": {"correct": 88, "total": 120, "value": 88 / 120},
    }
    (folder / SCORES).write_text(json.dumps(scores))
    return folder


@dataclasses.dataclass
class Loaded:
    base: str
    adapter: str | None = None
    hf_config: dict = dataclasses.field(default_factory=lambda: {"model_type": "llama"})


@dataclasses.dataclass
class Tokens:
    chat_template: str | None = "{{ messages }}"


@pytest.fixture
def card_of(run, monkeypatch, tmp_path):
    """card_of(**options) -> the card of an export of the run, and its metadata as the hub's library reads it."""
    monkeypatch.setattr(run_card, "is_score_model", lambda loaded: False)

    def make(base: str = "/home/someone/models/Some-1B", form: str = "adapter", **options):
        options.setdefault("run", run)
        loaded = Loaded(base)
        known = run_card.base_of_export(loaded)
        card = run_card.card_of(loaded, Tokens(), (), form=form, base=known, **options)
        folder = tmp_path / "export"
        folder.mkdir(exist_ok=True)
        assert write_card(folder, card)
        return ModelCard.load(folder / "README.md")

    return make


def results(card: ModelCard) -> dict[str, EvalResult]:
    return {one.metric_type: one for one in card.data.eval_results or ()}


def test_a_card_says_what_was_trained_and_how_well_it_does(card_of):
    card = card_of("hf://owner/Some-1B@main")
    data = card.data
    assert (data.base_model, data.library_name, data.base_model_relation) == ("owner/Some-1B", "peft", "adapter")
    assert data.datasets == ["owner/rows"] and data.model_name == "my-run" and data.pipeline_tag == "text-generation"
    assert {"jaxft", "lora", "sft", "base_model:adapter:owner/Some-1B"} <= set(data.tags)
    measured = results(card)
    assert measured.keys() == {"loss", "json_exact"} and measured["loss"].metric_value == 1.5
    score = measured["json_exact"]
    low, high = binomtest(88, 120).proportion_ci(method="wilson")
    assert score.metric_args["n"] == 120 and score.metric_args["ci95"] == pytest.approx([low, high], abs=1e-4)
    assert (score.metric_value, score.metric_args["base_model"]) == (pytest.approx(88 / 120), 0.025)
    expected = [
        "| rows | 7 |", "| tokens | 90 |", "`" + "ab" * 8 + "`", "--train.steps=4", "PeftModel.from_pretrained",
        "| `optim.learning_rate` | `1e-05` |", "--model=hf://owner/Some-1B",
    ]  # fmt: skip
    for text in expected:
        assert text in card.text, text


def test_a_card_has_no_folder_of_this_machine(card_of):
    for form in ("adapter", "merged"):
        card = card_of(form=form)
        assert "someone" not in str(card) and card.data.base_model is None
    assert card.data.library_name == "transformers" and "peft" not in card.text


def test_an_older_step_has_the_figures_of_that_step(card_of):
    card = card_of(step=2)
    assert {name: one.metric_value for name, one in results(card).items()} == {"loss": 2.5}
    assert "| steps | 2 of 4 |" in card.text


def test_a_model_without_a_run_has_a_card_too(card_of):
    card = card_of("hf://owner/Some-1B", "merged", run=None)
    assert card.data.base_model == "owner/Some-1B" and card.data.eval_results is None
    assert "base_model_relation" not in card.data.to_dict()
    assert "Training" not in card.text and "AutoModelForCausalLM" in card.text


def test_a_card_that_somebody_wrote_is_kept(tmp_path):
    card = Card(title="t", form="merged", base=BaseFacts())
    assert write_card(tmp_path, card) and MARK in (tmp_path / "README.md").read_text()
    assert write_card(tmp_path, dataclasses.replace(card, title="other"))
    assert "# other" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("my own words")
    assert not write_card(tmp_path, card) and (tmp_path / "README.md").read_text() == "my own words"


def test_the_code_of_every_card_is_python():
    import re

    for form in ("adapter", "merged"):
        for classifies in (True, False):
            for chats in (True, False):
                card = Card(title="t", form=form, base=BaseFacts(), classifies=classifies, chats=chats)
                (code,) = re.findall(r"```python\n(.*?)```", card.text(), re.DOTALL)
                compile(code, "card", "exec")


def test_results_keep_their_own_counts():
    two = (Result(metric="loss", value=1.0, rows=5), Result(metric="exact_match", value=0.5, rows=4))
    card = ModelCard(Card(title="t", form="merged", base=BaseFacts(), results=two).text())
    assert {name: one.metric_args for name, one in results(card).items()} == {"loss": {"n": 5}, "exact_match": {"n": 4}}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, BaseFacts()),
        ({"README.md": "---\nlicense: gemma\n---\nhello"}, BaseFacts(license="gemma")),
        ({"README.md": "no metadata"}, BaseFacts()),
        ({"README.md": "---\nlicense: [\n---\n"}, BaseFacts()),
        ({"LICENSE": "   Apache License\n      Version 2.0, January 2004"}, BaseFacts(license="apache-2.0")),
        ({"LICENSE.txt": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"}, BaseFacts(license="llama3.1")),
        ({"COPYING": "something of our own"}, BaseFacts(license="other")),
        ({"config.json": '{"_name_or_path": "owner/base"}'}, BaseFacts(name="owner/base")),
        ({"config.json": '{"_name_or_path": "runs/model"}'}, BaseFacts()),
        ({"config.json": '{"_name_or_path": "/data/base"}'}, BaseFacts()),
        ({"config.json": "damaged"}, BaseFacts()),
    ],
)
def test_a_base_is_known_by_what_stands_beside_its_weights(tmp_path, files, expected):
    folder = tmp_path / "base"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    assert base_facts(str(folder)) == expected


def test_a_base_in_the_hubs_cache_is_known_by_its_name(tmp_path):
    folder = tmp_path / "models--owner--Some-1B--it" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    assert base_facts(str(folder)).name == "owner/Some-1B--it"
    assert base_facts("hf://owner/Some-1B@main", str(folder)).name == "owner/Some-1B"


def test_names_of_others_are_no_markdown_and_no_html():
    hostile = "a`b|c<script>[x](http://y)\x1b[2J\n# Forged"
    card = Card(title=hostile, form="adapter", base=BaseFacts(name="owner/name", license="mit"))
    lines = card.text().splitlines()
    assert [line for line in lines if line.startswith("# ")] == [
        r"# a\`b\|c\<script\>\[x\](http://y)\\x1b\[2J\\n# Forged"
    ]
    code = markdown_code(hostile)
    assert code.startswith("`` ") and code.endswith(" ``") and r"b\|c" in code and "\n" not in code
    assert markdown_code("plain/path") == "`plain/path`"


@pytest.mark.parametrize("license", ["<script>x</script>", "a\nb", "x" * 200])
def test_a_license_that_is_no_name_is_not_written_into_a_page(tmp_path, license):
    (tmp_path / "README.md").write_text(f"---\nlicense: {json.dumps(license)}\n---\n")
    assert base_facts(str(tmp_path)).license == "other"
