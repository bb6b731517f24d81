"""Answers are scored without their thoughts, which no reference holds."""

from types import SimpleNamespace

from jaxft.assets import ASSETS
from jaxft.config import EvalConfig
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.runs import scores
from jaxft.runs.scores import answers as answering


def test_thoughts_do_not_count(monkeypatch):
    said = ["<think>\n2 + 2\n</think>\n\n4", "four, so\n</think>4", " 4", "<think>4"]
    tokenizer = load_tokenizer(ASSETS / "smoke")
    done = [SimpleNamespace(tokens=tokenizer.encode(text), finish_reason="stop") for text in said]
    monkeypatch.setattr(answering, "generate_tokens", lambda *a, **k: done)
    data = SimpleNamespace(eval_prompts=[[0]] * 4, eval_references=["4"] * 4)
    result = scores.answer(None, tokenizer, data, EvalConfig(metric="exact_match"))
    assert result.texts == ("4", "4", " 4", "")  # thoughts that never end are no answer
    assert result.score.correct == 3
