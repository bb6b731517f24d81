"""Scoring: what each metric counts as right, and what is refused."""

import dataclasses

import pytest

from jaxft.config import EvalConfig, choices
from jaxft.errors import ConfigError, DataError
from jaxft.evaluation.scoring import Score, json_fields, score

REFERENCE = '{"intent":"refund","order":null}'


def passes(metric: str, answer: str, reference: str = REFERENCE) -> bool:
    return score(metric, [answer], [reference]).per_row == (True,)


def test_every_metric_of_the_config_can_be_scored() -> None:
    for metric in choices(EvalConfig, "metric"):
        assert score(metric, [REFERENCE], [REFERENCE]).value == 1.0


def test_counts_and_rows() -> None:
    result = score("exact_match", ["a", "b", "c", "d"], ["a", "x", "c", "x"])
    assert result == Score(metric="exact_match", correct=2, total=4, per_row=(True, False, True, False))
    assert result.value == 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.correct = 4


def test_exact_match_strips_the_ends_only() -> None:
    assert passes("exact_match", " 42\n", "42 ")
    assert not passes("exact_match", "4 2", "42")
    assert not passes("exact_match", "Yes", "yes")


@pytest.mark.parametrize("answer", ["{}", " [1, 2]\n", '"text"', "null", "-1.5e3", '{"a":{"b":[true]}}'])
def test_json_valid_takes_any_json_value(answer: str) -> None:
    assert passes("json_valid", answer, "anything, this is not looked at")


@pytest.mark.parametrize(
    "answer",
    [
        *("", "refund", "{'a': 1}", '{"a":1,}', '{"a":1', "{} {}", "```json\n{}\n```", "NaN", "[-Infinity]"),
        *('{"a":1,"a":2}', "9" * 5000, "[" * 100_000),
    ],
    ids=lambda answer: answer[:12],
)
def test_json_valid_is_strict(answer: str) -> None:
    assert not passes("json_valid", answer)


@pytest.mark.parametrize(
    "answer",
    [
        REFERENCE,
        '\n{"intent": "refund", "order": null} ',
        '{"order":null,"intent":"refund"}',
        '{"intent":"\\u0072efund","order":null}',
    ],
)
def test_json_exact_compares_values(answer: str) -> None:
    assert passes("json_exact", answer)


@pytest.mark.parametrize(
    "answer",
    [
        '{"intent":"refund"}',
        '{"intent":"refund","order":null,"urgency":"low"}',
        '{"intent":"refund","order":"null"}',
        '{"intent":"Refund","order":null}',
        '{"intent":"refund","intent":"refund","order":null}',
        f"```json\n{REFERENCE}\n```",
        f"{REFERENCE} I hope this helps!",
        f"[{REFERENCE}]",
        "not JSON",
    ],
)
def test_json_exact_forgives_nothing(answer: str) -> None:
    assert not passes("json_exact", answer)


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("1", "1.0", True),
        ("1", "true", False),
        ("[0]", "[false]", False),
        ('{"a":[true]}', '{"a":[1]}', False),
        ("[1,2]", "[2,1]", False),
        ("[1]", "[1,1]", False),
        ("{}", "[]", False),
        ('"1"', "1", False),
        ("null", "false", False),
    ],
)
def test_json_exact_keeps_json_types_apart(answer: str, reference: str, same: bool) -> None:
    assert passes("json_exact", answer, reference) is same
    assert passes("json_exact", reference, answer) is same


def test_fields_are_counted_one_by_one() -> None:
    references = ['{"intent":"refund","order":"17"}', '{"intent":"fault","order":null}', '{"intent":"fault","note":1}']
    answers = ['{"intent":"refund","order":17}', '{"order":null,"extra":0}', "nonsense"]
    assert json_fields(answers, references) == {"intent": 1 / 3, "order": 1 / 2, "note": 0.0}
    assert list(json_fields(answers, references)) == ["intent", "order", "note"]


def test_an_absent_field_is_not_a_null_field() -> None:
    assert json_fields(["{}", "[]"], ['{"order":null}'] * 2) == {"order": 0.0}


def test_unknown_metric() -> None:
    with pytest.raises(
        ConfigError, match=r"'json_exat'.*exact_match, json_valid, json_exact.*Did you mean 'json_exact'"
    ):
        score("json_exat", ["{}"], ["{}"])


@pytest.mark.parametrize("call", [lambda a, r: score("exact_match", a, r), json_fields])
def test_lengths(call) -> None:
    with pytest.raises(DataError, match="2 answers for 1 references"):
        call(["{}", "{}"], ["{}"])
    with pytest.raises(DataError, match="no answers to score"):
        call([], [])


@pytest.mark.parametrize("call", [lambda a, r: score("json_exact", a, r), json_fields])
def test_a_reference_that_is_not_json_is_named(call) -> None:
    with pytest.raises(DataError, match=r"reference 2 of 3 is not JSON \(.*\): 'refund, please'"):
        call(["{}", "{}", "{}"], ["{}", "refund, please", "{}"])
    with pytest.raises(DataError, match=r"reference 1 of 1 .*aaa\.\.\.'\. Mend the row"):
        call(["{}"], ["a" * 500])


def test_fields_want_objects() -> None:
    with pytest.raises(DataError, match=r"reference 1 of 1 is not a JSON object.*\[1\].*json_exact"):
        json_fields(["[1]"], ["[1]"])
