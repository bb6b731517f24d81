"""Scoring: what each metric counts as right, and what is refused."""

import dataclasses

import pytest

from jaxft.errors import ConfigError, DataError
from jaxft.evaluation.scoring import Score, check_references, json_fields, score

REFERENCE = '{"intent":"refund","order":null}'


def passes(metric: str, answer: str, reference: str = REFERENCE) -> bool:
    return score(metric, [answer], [reference]).per_row == (True,)


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


def test_references_that_cannot_be_scored_are_all_named() -> None:
    references = ["{}", "refund, please", "[1, 2]", " ", "{'a': 1}", '{"a": NaN}', '{"a": 1, "a": 1}', "a" * 500]
    with pytest.raises(DataError, match=r"^6 of 8 held-out answers cannot be scored by json_exact") as error:
        score("json_exact", ["{}"] * 8, references)
    assert "reference 2 of 8 is not JSON (Expecting value" in str(error.value) and "'refund, please'" in str(
        error.value
    )
    assert "reference 4 of 8 is empty" in str(error.value) and "aaa...'" in str(error.value)
    assert "exact_match, which compares text" in str(error.value)
    with pytest.raises(DataError, match="row 7 of a.jsonl is empty"):
        check_references("exact_match", [""], ["row 7 of a.jsonl"])
    check_references("json_valid", references)
    check_references("exact_match", ["a", "{"])


@pytest.mark.parametrize("reference", ["[1, {}]", "3", '"text"', "null", "true"])
@pytest.mark.parametrize("metric", ["json_exact", "json_valid"])
def test_every_json_value_is_scored_and_only_objects_have_fields(metric: str, reference: str) -> None:
    assert score(metric, [reference, "{"], [reference, '{"a": 1}']).per_row == (True, False)
    assert json_fields([reference, '{"a": 1}'], [reference, '{"a": 1}']) == {"a": 1.0}
    assert json_fields([reference], [reference]) == {}


def test_json_valid_reads_no_reference() -> None:
    assert score("json_valid", ["{}"], ["not JSON"]).correct == 1 and json_fields(["{}"], ["not JSON"]) == {}
