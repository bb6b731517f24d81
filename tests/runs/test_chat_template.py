"""The template that a run is trained with is the one that every export renders with, byte for byte."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

import jaxft
from jaxft import models
from jaxft.assets import ASSETS
from jaxft.checkpoint import hf
from jaxft.conversion.convert import convert
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import ConfigError
from jaxft.runs import folder as files
from jaxft.training.log import read_metrics

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]\r\n{% endfor %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}:\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}«{{ c.function | tojson }}»{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "description": "é", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ålesund"}}}
CHATS = (
    [{"role": "user", "content": "Hi 漢字"}],
    [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [CALL]},
        {"role": "tool", "content": "3 °C"},
    ],
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a mixture, trained with a template of its own; its config."""
    here = tmp_path_factory.mktemp("templates")
    (here / "base").mkdir()
    config = json.loads((ASSETS / "smoke" / "config.json").read_text()) | {"vocab_size": 264}
    model = models.random_model(models.config_from_hf(config), dtype="float32", param_dtype="float32", seed=0)
    hf.write_weights(model, str(here / "base"))
    hf.write_config(str(here / "base"), config, dtype="float32")
    load_tokenizer(ASSETS / "smoke").save(here / "base")
    tokenizer = json.loads((here / "base" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"th": 259, "the": 260}
    tokenizer["model"]["merges"] = [["t", "h"], ["th", "e"]]  # llama.cpp wants some
    (here / "base" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (here / "mine.jinja").write_text(TEMPLATE, newline="")
    settings = {
        "output_dir": str(here / "run"), "model.path": str(here / "base"), "model.random_init": False,
        "data.chat_template": str(here / "mine.jinja"), "export.merged": True, "eval.metric": None,
        "data.eval": None, "train.steps": 2,
        "train.eval_every": None, "checkpoint.every": None, "checkpoint.best_metric": None,
    }  # fmt: skip
    config = jaxft.get_config("configs/smollm2_135m_mixture.py:smoke", settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxft.sharding.distributed.start", lambda *a, **k: True)
        jaxft.train(config, console=Console(quiet=True))
    return config


def rendered(tokenizer):
    return [
        tokenizer.render(messages, tools=tools, add_generation_prompt=asks)
        for messages in CHATS
        for tools in ((), (TOOL,))
        for asks in (False, True)
    ]


def test_every_export_renders_as_training_did(run, tmp_path):
    folder = run.output_dir
    trained = load_tokenizer(run.model.path, chat_template=run.data.chat_template)
    expected, stops = rendered(trained), trained.stop_ids
    assert "Ålesund" in expected[-1] and expected != rendered(load_tokenizer(run.model.path))
    places = {
        "run": folder,
        "adapter": f"{folder}/adapter",
        "merged": f"{folder}/merged",
        "model.gguf": str(tmp_path / "model.gguf"),
        "again": str(tmp_path / "again"),
        "of_adapter": str(tmp_path / "of_adapter"),
    }
    convert(f"{folder}/adapter", places["model.gguf"], console=Console(quiet=True))
    jaxft.export(folder, places["again"])
    jaxft.export(f"{folder}/adapter", places["of_adapter"])
    shutil.copytree(folder, tmp_path / "unexported", ignore=shutil.ignore_patterns("adapter", "merged"))
    places["unexported"] = str(tmp_path / "unexported")
    for name, place in places.items():
        tokenizer = load_tokenizer(place)
        assert rendered(tokenizer) == expected, name
        # llama.cpp, and so a GGUF file, also ends at control tokens that are spelt like an end.
        spelt = {trained.encode("<|endoftext|>")[0]} if name.endswith(".gguf") else set()
        assert tokenizer.stop_ids == stops | spelt, name
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(f"{folder}/merged")
    for tools in (None, [TOOL]):
        ours = trained.render(CHATS[1], tools=tools, add_generation_prompt=True)
        assert theirs.apply_chat_template(CHATS[1], tools=tools, add_generation_prompt=True, tokenize=False) == ours


def test_a_run_remembers_its_template(run, capsys):
    template = load_tokenizer(run.model.path, chat_template=run.data.chat_template).chat_template
    assert jaxft.load_tokenizer(run.output_dir).chat_template == template
    own = Path(run.data.chat_template).read_bytes()
    try:
        changed = TEMPLATE.replace("{{ m.role }}:", "<{{ m.role }}>").replace("assistant:", "<assistant>")
        Path(run.data.chat_template).write_text(changed, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"trained with another chat template, .*chat_template.jinja"):
            jaxft.train(run, console=Console(quiet=True))
        # What is scored, exported and served later does not read the changed file.
        assert files.chat_template(run.output_dir) == template
        assert jaxft.load_tokenizer(run.output_dir).chat_template == template
    finally:
        Path(run.data.chat_template).write_bytes(own)


def test_the_log_and_the_folder_tell_the_shares(run):
    rows = read_metrics(run.output_dir)
    assert {"token_share/domain", "token_share/general"} <= set(rows[-1])
    assert rows[-1]["token_share/domain"] + rows[-1]["token_share/general"] == pytest.approx(1)
    data = json.loads(Path(run.output_dir, "data.json").read_text(encoding="utf-8"))
    said = data["stages"][-1]["sets"]
    assert [one["name"] for one in said] == ["domain", "general"] and said[1]["sequences"] == 0
    assert "epochs" in data["mixture"]["general"]
    report = Path(run.output_dir, "report.html").read_text(encoding="utf-8")
    assert "Mixture" in report and data["mixture"]["general"] in report
