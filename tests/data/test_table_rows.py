"""Tokens without a row in the model's embedding table: refused by name wherever rows are read, never used to pad."""

import json

import numpy as np
import pytest

from jaxft.config import DataConfig
from jaxft.data.batch import assemble
from jaxft.data.chat.encode import encode, prompt_of
from jaxft.data.formats import read_row
from jaxft.data.prompts import read_prompts
from jaxft.data.sources import open_rows
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.data.tokenizers.padding import separate_pad_id
from jaxft.data.tokenizers.table import rows_by_config, table_rows
from jaxft.errors import DataError
from jaxft.rollouts.environments.template import TurnTemplate

NEW = ("<call>", "<|think|>")


@pytest.fixture
def folder(tokenizer_of, tmp_path):
    """A model whose tokenizer got two tokens after its tables were made."""
    tokenizer = tokenizer_of("chatml")
    rows = tokenizer.vocab_size
    backend = tokenizer.backend.__class__(tokenizer_object=tokenizer.backend.backend_tokenizer.__class__.from_str(
        tokenizer.backend.backend_tokenizer.to_str()
    ))  # fmt: skip
    backend.add_tokens(list(NEW))
    backend.chat_template, backend.eos_token = tokenizer.chat_template, "<|im_end|>"
    backend.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))
    return tmp_path / "model"


def chat(answer):
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]}


def test_a_row_with_such_a_token_is_refused_with_the_token_and_its_id(folder):
    tokenizer = load_tokenizer(folder)
    rows = tokenizer.table_rows
    assert tokenizer.vocab_size == rows + 2
    message = (
        rf"line 3: '<call>' \(id {rows}\), '<\|think\|>' \(id {rows + 1}\): .* has {rows + 2} tokens, .* {rows} rows"
    )
    row = read_row(chat("<call>f()<|think|>"), DataConfig(), row=2, where="line 3")
    with pytest.raises(DataError, match=message):
        encode(row, tokenizer)
    question = {"messages": [{"role": "user", "content": "Say <call>"}, {"role": "assistant", "content": "no"}]}
    for value in (chat("x <call>"), question, {"prompt": "<call>", "completion": "x"}, {"text": "a <call>"}):
        with pytest.raises(DataError, match=r"line 9: '<call>' \(id"):
            encode(read_row(value, DataConfig(), row=8, where="line 9"), tokenizer)
    for value in (question, {"prompt": "a <call>", "completion": "x"}):
        with pytest.raises(DataError, match=r"line 9: '<call>' \(id"):
            prompt_of(read_row(value, DataConfig(), row=8, where="line 9"), tokenizer)
    (example,) = encode(read_row(chat("f()"), DataConfig(), row=2, where="line 3"), tokenizer)
    assert example.tokens.max() < rows


@pytest.mark.parametrize("prompt", ["Say <call>", [{"role": "user", "content": "Say <call>"}]])
def test_prompts_and_replies_of_environments_are_refused_too(folder, prompt, tmp_path):
    tokenizer = load_tokenizer(folder)
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "Say more"}) + "\n" + json.dumps({"prompt": prompt}) + "\n")
    config = DataConfig(train=str(path))
    with pytest.raises(DataError, match=r"line 2.*'<call>' \(id"):
        list(read_prompts(open_rows(str(path)), config, tokenizer, ()))
    messages = [{"role": "user", "content": "Say <call>"}]
    with pytest.raises(DataError, match=r"a prompt of rollout.environment: '<call>'"):
        TurnTemplate(tokenizer).prompt(messages)


def test_padding_has_a_row(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<call>"}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.backend.pad_token_id == tokenizer.table_rows
    assert tokenizer.pad_id == tokenizer.eos_id < tokenizer.table_rows
    assert tokenizer.generation_config()["pad_token_id"] == tokenizer.pad_id
    assert separate_pad_id(tokenizer) < tokenizer.table_rows
    (example,) = encode(read_row(chat("f()"), DataConfig(), row=0, where=""), tokenizer)
    batch = assemble([[example], []], 64, tokenizer.pad_id)
    assert batch.tokens_BS.max() < tokenizer.table_rows and np.asarray(batch.targets_BS).max() < tokenizer.table_rows


def test_a_table_of_unknown_size_or_with_spare_rows_refuses_nothing(folder):
    row = read_row(chat("<call>"), DataConfig(), row=0, where="")
    config = json.loads((folder / "config.json").read_text())
    for other in (config | {"vocab_size": 10**6}, {}):
        (folder / "config.json").write_text(json.dumps(other))
        (example,) = encode(row, load_tokenizer(folder))
        assert load_tokenizer(folder).token(example.tokens[example.mask == 1][0]) == "<call>"


def test_the_size_comes_from_whatever_file_the_model_has(folder, tmp_path):
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert table_rows(str(folder)) == table_rows(str(folder / "tokenizer.json")) == rows
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    assert table_rows(str(adapter)) == rows
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/nowhere/else/at/all"}))
    assert table_rows(str(adapter)) is None
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"model": {"path": "x"}}))
    (run / "model" / "config.json").write_text(json.dumps({"vocab_size": 7}))
    assert table_rows(str(run)) == 7
    assert rows_by_config({"text_config": {"vocab_size": 5}, "vocab_size": 9}) == 5
    assert rows_by_config({"text_config": {}, "vocab_size": 9}) == 9
