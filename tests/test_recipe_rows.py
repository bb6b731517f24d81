"""The rows of docs/recipes.md: what the script makes of small files, and that the configs' metrics can score them."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from jaxft.config import load

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import make_recipe_rows

    return make_recipe_rows


def test_intents_are_taken_in_turn(script: ModuleType, tmp_path: Path) -> None:
    texts = [("a1", "a"), ("a2", "a"), ("a3", "a"), ("c1", "c"), ("b1", "b"), ('"b, 2"', "b")]
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("text,category\n" + "".join(f"{text},{label}\n" for text, label in texts))
    parts = script.intents(str(tmp_path), 2, {"train": 3, "heldout": 1})
    asked = [[row["messages"][1]["content"] for row in parts[part]] for part in ("train", "heldout")]
    assert asked == [["a1", "b1", "a2", "b, 2", "a3"], ["a1", "b1"]]
    system, _, answer = (turn["content"] for turn in parts["heldout"][1]["messages"])
    assert system.endswith("one of: a, b.") and answer == "b"


def test_marks_of_a_calculator_are_left_out(script: ModuleType, tmp_path: Path) -> None:
    line = json.dumps({"question": "2 and 3?", "answer": "2+3 = <<2+3=5>>5\n#### 5"})
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(f"{line}\n")
    (row,) = script.reasoning(str(tmp_path))["heldout"]
    assert row["messages"][2]["content"] == "2+3 = 5\n#### 5"
    assert re.findall(load("smollm2_135m_reasoning").eval.pattern, row["messages"][2]["content"]) == ["5"]


def test_notes_have_the_style_and_no_subject_is_in_both_parts(script: ModuleType) -> None:
    parts = script.style({"train": 80, "heldout": 40})
    assert parts == script.style({"train": 80, "heldout": 40})
    pattern, subjects = load("smollm2_135m_style").eval.pattern, {}
    for part, rows in parts.items():
        answers = [row["messages"][2]["content"] for row in rows]
        assert all(re.search(pattern, answer) for answer in answers)
        subjects[part] = {answer.partition(":")[0] for answer in answers}
    assert not subjects["train"] & subjects["heldout"]
    hours = {tuple(map(int, re.search(r", (\d\d):(\d\d)\.", row["messages"][2]["content"]).groups())) for row in rows}
    assert min(hours) >= (7, 0) and max(hours) < (20, 0)
