"""`answers.jsonl`: what each held-out row was answered, kept while a run answers and used again when it goes on."""

import json
from types import SimpleNamespace

import pytest

from jaxft.assets import ASSETS
from jaxft.config import EvalConfig
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.runs import scores
from jaxft.runs.scores import AnswersFile, Kept, answers, answers_key

ROWS = 11
CONFIG = EvalConfig(metric="exact_match", batch_size=1, max_new_tokens=4)


@pytest.fixture
def asked(monkeypatch):
    """The prompts that a model was given, in parts; it repeats the last token of each."""
    given = []

    def generate(module, prompts, **settings):
        given.append([tuple(prompt) for prompt in prompts])
        return [SimpleNamespace(tokens=(prompt[-1],), finish_reason="length") for prompt in prompts]

    monkeypatch.setattr(answers, "generate_tokens", generate)
    return given


def answer(folder, *, stop_after=99, way="base", step=None):
    """Answers to the prompts 0 a, 0 b, ..., of which the references of every second are right."""
    tokenizer, parts = load_tokenizer(ASSETS / "smoke"), []
    letters = [chr(ord("a") + row) for row in range(ROWS)]
    data = SimpleNamespace(
        eval_prompts=[[0, *tokenizer.encode(letter)] for letter in letters],
        eval_references=[letter if row % 2 else "?" for row, letter in enumerate(letters)],
        eval_names=[f"row {row}" for row in range(ROWS)],
    )

    def between():
        parts.append(1)
        if len(parts) > stop_after:
            raise KeyboardInterrupt

    kept = Kept(file=AnswersFile(folder), way=way, model=step)
    return scores.answer(None, tokenizer, data, CONFIG, between, kept=kept)


def lines(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_a_run_that_was_stopped_answers_what_is_left(tmp_path, asked):
    with pytest.raises(KeyboardInterrupt):
        answer(tmp_path, stop_after=2)
    assert [row["row"] for row in lines(tmp_path)] == list(range(2 * answers.ROUNDS))
    assert all("scores" not in row for row in lines(tmp_path))
    result = answer(tmp_path)
    assert sum(map(len, asked)) == ROWS and [len(part) for part in asked] == [4, 4, 3]
    assert result.texts == tuple("abcdefghijk") and result.score.correct == 5
    expected = {"way": "base", "row": 3, "name": "row 3", "text": "d", "scores": {"exact_match": True}}
    assert lines(tmp_path)[3].items() >= expected.items()
    assert lines(tmp_path)[2]["scores"] == {"exact_match": False}
    assert {(row["prompt_tokens"], row["answer_tokens"]) for row in lines(tmp_path)} == {(2, 1)}


def test_other_weights_answer_anew_and_leave_the_answers_of_the_base(tmp_path, asked):
    answer(tmp_path)
    before = lines(tmp_path)
    answer(tmp_path, way="tuned", step=8)
    answer(tmp_path, way="tuned", step=8)
    assert sum(map(len, asked)) == 2 * ROWS
    answer(tmp_path, way="tuned", step=12)
    assert sum(map(len, asked)) == 3 * ROWS
    assert lines(tmp_path)[:ROWS] == before
    assert [row["way"] for row in lines(tmp_path)] == ["base"] * ROWS + ["tuned"] * ROWS


@pytest.mark.parametrize("damage", ['{"way": "base"', "[1]\n", "3\n", '{"way": "base", "row": 0}\n', "\xff"])
def test_a_damaged_file_is_told_of_and_made_anew(tmp_path, asked, caplog, damage):
    answer(tmp_path)
    with (tmp_path / "answers.jsonl").open("a", encoding="latin-1") as file:
        file.write(damage)
    answer(tmp_path)
    assert sum(map(len, asked)) == 2 * ROWS and "answers.jsonl is damaged" in caplog.text
    assert len(lines(tmp_path)) == ROWS


def test_the_key_is_that_of_prompts_length_and_weights():
    keys = {answers_key(*one) for one in (([[1, 2]], 4), ([[1], [2]], 4), ([[1, 2]], 5), ([[1, 2]], 4, 8))}
    assert len(keys) == 4
