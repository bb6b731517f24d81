"""From a run's config to examined examples and held-out prompts."""

import dataclasses
import json

import pytest

import jaxft.data
from jaxft.config import DataConfig, EvalConfig, ModelConfig, RunConfig
from jaxft.data import prepare
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import DataError


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def run(train, *, eval_limit=None, **data):
    return RunConfig(
        model=ModelConfig(path="x"), data=DataConfig(train=train, **data), eval=EvalConfig(limit=eval_limit)
    )


def test_a_run(jsonl, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    train = jsonl([chat(f"q{i}", f"a{i}") for i in range(20)])
    held_out = jsonl([chat(f"q{i}", f"a{i}") for i in range(18, 25)], name="eval.jsonl")
    ready = prepare(run(train, eval=held_out, eval_limit=3, max_length=64), tokenizer)
    assert len(ready.train_examples) == 20 and len(ready.eval_examples) == 7
    assert [example.row for example in ready.train_examples] == list(range(20))
    assert ready.eval_references == ["a18", "a19", "a20"]
    for prompt, example in zip(ready.eval_prompts, ready.eval_examples, strict=False):
        assert example.tokens[: len(prompt)].tolist() == prompt
    assert ready.examination.formats == {"messages": 20} and ready.examination.rows == 20
    assert "2 of 7 held-out examples are in the training set too" in ready.eval_examination.warnings
    assert json.loads(json.dumps(ready.examination.to_dict()))["trained_tokens"] > 0


def test_without_held_out_rows(jsonl, tokenizer_of):
    ready = prepare(run(jsonl([{"text": "Hello there"}])), tokenizer_of("plain"))
    assert ready.eval_examples is None and ready.eval_examination is None and ready.eval_prompts == []


def test_plain_text_held_out_asks_nothing(jsonl, tokenizer_of):
    rows = [{"text": f"Hello {i}"} for i in range(10)]
    ready = prepare(run(jsonl(rows), eval_fraction=0.2), tokenizer_of("plain"))
    assert len(ready.eval_examples) == 2 and ready.eval_prompts == [] and ready.eval_references == []


def test_a_metric_needs_answers(jsonl, tokenizer_of):
    rows = [{"text": f"Hello {i}"} for i in range(10)]
    config = run(jsonl(rows), eval_fraction=0.2)
    scored = dataclasses.replace(config, eval=EvalConfig(metric="exact_match"))
    with pytest.raises(DataError, match=r"eval.metric compares answers with references, but the held-out rows are pl"):
        prepare(scored, tokenizer_of("plain"))


def test_mixed_formats_are_counted_and_told(jsonl, tokenizer_of):
    rows = [chat("q", "a"), {"instruction": "q", "output": "a"}, {"prompt": "q:", "completion": " a"}]
    found = prepare(run(jsonl(rows)), tokenizer_of("chatml")).examination
    assert found.formats == {"messages": 1, "alpaca": 1, "prompt_completion": 1}
    assert any("several formats" in warning for warning in found.warnings)


def test_refusals_name_the_line(jsonl, tokenizer_of):
    chatml = tokenizer_of("chatml")
    with pytest.raises(DataError, match=r"rows.jsonl line 2 .*no assistant message"):
        prepare(run(jsonl([chat("q", "a"), {"messages": [{"role": "user", "content": "q"}]}])), chatml)
    with pytest.raises(DataError, match=r"rows.jsonl .*1 line.* line 1, has"):
        prepare(run(jsonl([chat("q" * 50, "a")]), max_length=8), chatml)
    with pytest.raises(DataError, match=r"rows.jsonl. is empty"):
        prepare(run(jsonl([])), chatml)
    with pytest.raises(DataError, match=r"eval.jsonl line 1 is of no known format"):
        prepare(run(jsonl([chat("q", "a")]), eval=jsonl([{"x": 1}], name="eval.jsonl")), chatml)
    doubled = tokenizer_of("llama3", "{{ bos_token }}" + tokenizer_of("llama3").chat_template)
    with pytest.raises(DataError, match=r"rows.jsonl line 1: BOS doubles"):
        prepare(run(jsonl([chat("q", "a")])), doubled)


def test_public_names_exist():
    assert all(hasattr(jaxft.data, name) for name in jaxft.data.__all__)


def test_real_questions(shared_data, smollm2_path, tokenizer_of):
    tokenizer = load_tokenizer(smollm2_path)
    config = run(
        str(shared_data / "gsm8k" / "train.jsonl"),
        prompt_field="question",
        completion_field="answer",
        limit=200,
        eval_fraction=0.01,
        eval_limit=4,
    )
    ready = prepare(config, tokenizer)
    assert ready.examination.rows == 200 and len(ready.eval_prompts) == 4
    assert all(example.tokens[-1] == tokenizer.eos_id for example in ready.train_examples)
