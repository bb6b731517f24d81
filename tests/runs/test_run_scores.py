"""Answers are scored without their thoughts, which no reference holds."""

from types import SimpleNamespace

from jaxft.assets import ASSETS
from jaxft.config import EvalConfig
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.runs import scores


def test_thoughts_do_not_count(monkeypatch):
    said = ["<think>\n2 + 2\n</think>\n\n4", "four, so\n</think>4", " 4", "<think>4"]
    tokenizer = load_tokenizer(ASSETS / "smoke")
    done = [SimpleNamespace(tokens=tokenizer.encode(text)) for text in said]
    monkeypatch.setattr(scores, "generate_tokens", lambda *a, **k: done)
    data = SimpleNamespace(eval_prompts=[[0]] * 4, eval_references=["4"] * 4)
    answers = scores.answer(None, tokenizer, data, EvalConfig(), "exact_match")
    assert answers.texts == ("4", "4", " 4", "")  # thoughts that never end are no answer
    assert answers.score.correct == 3
