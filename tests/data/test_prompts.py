"""Rows of prompts: what the model is asked, and what reward functions get of the row."""

import json

import numpy as np
import pytest

from jaxft import api
from jaxft.assets import ASSETS
from jaxft.config import DataConfig, load
from jaxft.data.prompts import prepare_prompts, read_prompts
from jaxft.data.sources import JsonlRows
from jaxft.errors import DataError

ASK = [{"role": "user", "content": "What is 7 + 5?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return api.load_tokenizer(str(ASSETS / "smoke"))


def read(tmp_path, tokenizer, *rows, **config):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_prompts(JsonlRows(str(path)), DataConfig(train="x", **config), tokenizer))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "reference": "12"},
        {"prompt": ASK, "completion": "12"},
        {"prompt": ASK, "completion": [{"role": "assistant", "content": "12"}]},
        {"messages": [*ASK, {"role": "assistant", "content": "12"}]},
        {"messages": [*ASK, {"role": "assistant", "content": "<think>hm</think>\n12"}]},
        {"conversations": [{"from": "human", "value": ASK[0]["content"]}, {"from": "gpt", "value": "12"}]},
        {"instruction": ASK[0]["content"], "output": "12"},
    ],
    ids=["own", "completion", "messages of a completion", "messages", "thoughts", "sharegpt", "alpaca"],
)
def test_the_prompt_is_what_the_model_is_asked_and_the_answer_a_reference(tmp_path, tokenizer, row):
    (prompt,) = read(tmp_path, tokenizer, row)
    asked = tokenizer.render(ASK, add_generation_prompt=True)
    assert tokenizer.decode(prompt.tokens, skip_special_tokens=False) == asked
    assert not prompt.mask.any() and [dict(m) for m in prompt.messages] == ASK
    assert prompt.reference == "12" and "prompt" not in prompt.columns


def test_text_is_continued_as_it_is(tmp_path, tokenizer):
    (prompt,) = read(tmp_path, tokenizer, {"prompt": "7 + 5 =", "answer": 12, "level": "easy"})
    assert prompt.messages == "7 + 5 =" and tokenizer.decode(prompt.tokens) == "7 + 5 ="
    assert prompt.columns == {"answer": 12, "level": "easy"} and prompt.reference is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_text": "?"}, r"rows.jsonl line 1: it has no prompt. A row needs 'prompt', or messages"),
        ({"prompt": [*ASK, {"role": "assistant", "content": "12"}]}, "its prompt ends in an answer"),
        ({"prompt": ""}, "its prompt is empty"),
        ({"prompt": [{"role": "usr", "content": "?"}]}, "message 1 has role 'usr'.*Did you mean 'user'"),
    ],
)
def test_rows_that_ask_nothing_are_refused(tmp_path, tokenizer, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, tokenizer, row)


def config_of(tmp_path, rows, **overrides):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "method.name": "grpo", "data.train": str(path), "data.eval": str(path), "data.limit": None,
        "data.eval_limit": None, "data.max_length": 48, "data.truncation": "refuse", "eval.metric": None,
        "rollout.max_completion_length": 16, "adapter.dropout": 0.0, "rewards.functions": "exact_match",
    }  # fmt: skip
    return load("configs/quickstart.py:smoke", settings | overrides)


def test_prompts_leave_room_for_their_answers(tmp_path, tokenizer):
    rows = [{"prompt": "x" * length, "reference": "y"} for length in (10, 32, 33, 40)]
    with pytest.raises(DataError, match=r"2 of 4 prompts of .* do not fit.*line 3, rows.jsonl line 4.*max_length=56"):
        prepare_prompts(config_of(tmp_path, rows), tokenizer)
    data = prepare_prompts(config_of(tmp_path, rows, **{"data.truncation": "drop"}), tokenizer)
    assert [len(prompt) for prompt in data.train_examples] == [10, 32]
    assert data.examination.dropped == 2 and data.examination.trained_tokens == 0
    assert data.eval_references == ["y", "y"] and len(data.eval_prompts) == 2
    assert "held-out prompts are in the training set too" in data.eval_examination.warnings[-1]
    with pytest.raises(DataError, match="none of the 2 prompts"):
        prepare_prompts(config_of(tmp_path, rows[2:], **{"data.truncation": "drop"}), tokenizer)


def test_a_score_needs_references(tmp_path, tokenizer):
    rows = [{"prompt": "a", "reference": "b"}, {"prompt": "c"}]
    with pytest.raises(DataError, match="1 of the 2 held-out prompts have none"):
        prepare_prompts(config_of(tmp_path, rows, **{"eval.metric": "exact_match"}), tokenizer)
    assert prepare_prompts(config_of(tmp_path, rows), tokenizer).eval_references == ["b"]


def test_every_prompt_of_the_shipped_rows_is_read(tokenizer):
    for split, count in (("train", 240), ("heldout", 64)):
        prompts = list(
            read_prompts(JsonlRows(str(ASSETS / "people" / f"{split}.jsonl")), DataConfig(train="x"), tokenizer)
        )
        assert len(prompts) == count and all(json.loads(prompt.reference)["name"] for prompt in prompts)
        assert len({np.asarray(prompt.tokens).tobytes() for prompt in prompts}) > 0.9 * count
