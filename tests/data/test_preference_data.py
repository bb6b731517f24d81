"""The script that makes preference data: solutions changed consistently, intents rejected as often as chosen."""

import importlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest

QUESTION = "Ann sells 48 clips in April and half as many in May, at $30 each. What does she get?"
SOLUTION = (
    "In May she sold 48/2 = <<48/2=24>>24 clips.\nThat makes 48+24 = <<48+24=72>>72 clips.\n"
    "She gets 72 x 30 = $<<72*30=2160>>2,160.\n#### 2160"
)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("make_preference_data")


@pytest.mark.parametrize("larger", [True, False])
def test_a_changed_result_is_carried_on_to_the_answer(script, larger):
    """Exactly one calculation is wrong, and every mention of a result has its new value."""
    for seed in range(20):
        wrong = script.changed_solution(QUESTION, SOLUTION.replace("2,160", "2160"), random.Random(seed), larger=larger)
        steps = script.CALCULATION.findall(wrong)
        assert len(steps) == 3 and sum(eval(expression) != int(value) for expression, value in steps) == 1
        answer = int(wrong.rpartition("#### ")[2])
        assert answer == int(steps[-1][1]) and (answer > 2160) is larger
        for _, value in steps:
            assert f"={value}>>{value}" in wrong


def test_commas_stay(script):
    wrong = script.changed_solution(QUESTION, SOLUTION, random.Random(0), larger=True)
    answer = int(wrong.rpartition("#### ")[2])
    assert f">>{answer:,}." in wrong


@pytest.mark.parametrize(
    ("question", "solution"),
    [
        (QUESTION.replace("$30", "$24"), SOLUTION),  # a result that is a number of the question too
        (QUESTION, SOLUTION.replace("48+24 = <<48+24=72>>72", "48+24 = 72")),  # not annotated
        (QUESTION, SOLUTION.replace("<<48/2=24>>24", "<<48/2=24.0>>24.0")),  # not written as a whole number
        (QUESTION, SOLUTION.replace("#### 2160", "#### 2161")),
        (QUESTION, SOLUTION.replace("48/2 = <<48/2", "48-24 = <<48-24")),  # a result that was calculated with before
    ],
)
def test_what_cannot_be_changed_surely_is_left_out(script, question, solution):
    assert script.changed_solution(question, solution, random.Random(0), larger=True) is None


def test_no_intent_is_a_sign_of_being_right(script):
    texts = {
        "card_lost": "lost my card",
        "card_late": "my card is late",
        "fee": "a fee for cash",
        "cash": "no cash out",
    }
    messages = [(f"{text} {n}", intent) for intent, text in texts.items() for n in ("today", "again", "please")]
    near = script.Nearness([text for text, _ in messages], [intent for _, intent in messages], sorted(texts))
    rows = near.pairs(messages)
    chosen, rejected = (Counter(row[side][0]["content"] for row in rows) for side in ("chosen", "rejected"))
    assert chosen == rejected == Counter(dict.fromkeys(texts, 3))
    assert all(row["chosen"] != row["rejected"] for row in rows)
    of_cards = [row["rejected"][0]["content"] for row in rows if row["chosen"][0]["content"].startswith("card")]
    assert all(name.startswith("card") for name in of_cards)  # the nearest, not just another
    assert script.shortcuts(rows, rows)["oftener chosen"] == 0.5
    labels = [row["label"] for row in script.labelled(rows)]
    assert labels == [True, False] * 6


def test_real_pairs_have_no_shortcut(script, shared_data):
    """No rule that reads the answers alone is right in more than 55% of held-out pairs; one calculation is wrong."""
    sets = {"banking77": script.banking77(shared_data / "banking77"), "gsm8k": script.gsm8k(shared_data / "gsm8k")}
    for splits in sets.values():
        shares = script.shortcuts(splits["train"], splits["heldout"])
        assert all(0.45 <= share <= 0.55 for share in shares.values()), shares
    assert len(sets["banking77"]["train"]) == 10_000 and len(sets["gsm8k"]["train"]) > 4_000
    changed = 0
    for line in (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:300]:
        row = json.loads(line)
        wrong = script.changed_solution(row["question"], row["answer"], random.Random(1), larger=True)
        if wrong is not None:
            steps = script.CALCULATION.findall(wrong)
            assert sum(abs(script._value(expression) - int(value)) > 1e-6 for expression, value in steps) == 1
            changed += 1
    assert changed > 100


def test_every_result_and_the_answer_are_raised(script):
    for seed in range(20):
        wrong = script.raised_solution(SOLUTION.replace("2,160", "2160"), random.Random(seed))
        numbers = [int(number) for number in script.NUMBER.findall(wrong)]
        right = [48, 2, 24, 48, 24, 72, 72, 30, 2160, 2160]
        changes = [number - before for number, before in zip(numbers, right, strict=True)]
        assert [change > 0 for change in changes] == [number in (2, 5, 8, 9) for number in range(10)]
        assert all(0 <= change <= 9 for change in changes)
    assert script.raised_solution("Half is 1/2=<<1/2=.5>>.5\n#### .5", random.Random(0)) is None
