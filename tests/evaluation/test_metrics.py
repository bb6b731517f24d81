"""Metrics of answers: what each counts, by its library or by hand, and what is refused."""

import builtins
import json
from collections import Counter

import numpy as np
import pytest

from jaxft.config import EvalConfig
from jaxft.config.train import METRICS as NAMES
from jaxft.errors import ConfigError, DataError
from jaxft.evaluation import metrics
from jaxft.evaluation.json_answers import Schema, load_schema
from jaxft.evaluation.metrics import ENOUGH_FOR_CLASSES, METRICS, OTHER, Measured, Settings, check, measure
from jaxft.evaluation.statistics import wilson_interval
from jaxft.runs.scores import measuring
from jaxft.runs.scores.measuring import Metrics

SCHEMA = {
    "type": "object", "required": ["intent"],
    "properties": {"intent": {"enum": ["refund", "other"]}, "order": {"type": ["integer", "null"]}},
}  # fmt: skip


@pytest.fixture
def schema(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    return load_schema(str(tmp_path / "schema.json"))


def test_the_config_names_all_metrics():
    assert set(NAMES) == set(METRICS)


def test_a_share_has_wilson_s_interval_and_its_fields():
    answers = ['{"a": 1, "b": 2}', '{"a": 1}', "no", '{"a": 2, "b": 2}']
    measured = measure("json_exact", answers, ['{"a": 1, "b": 2}'] * 4)
    assert measured.per_row == (True, False, False, False) and measured.correct == 1
    summary = measured.summary()
    assert summary["interval"] == list(wilson_interval(1, 4)) and summary["value"] == 0.25 and summary["total"] == 4
    assert summary["fields"] == {"a": 0.5, "b": 0.5}
    assert summary["field_intervals"]["a"] == list(wilson_interval(2, 4))


def test_fields_of_json_are_those_of_the_schema(schema):
    answers = ['{"intent": "refund"}', '{"intent": "refund", "order": 3, "more": 1}', "[]", '{"order": true}']
    references = ['{"intent": "refund"}', '{"intent": "other", "order": 3}'] + ['{"intent": "other", "order": 1}'] * 2
    measured = measure("json_fields", answers, references, Settings(schema=schema))
    assert measured.values == (1.0, 0.5, 0.0, 0.0) and measured.correct is None
    assert measured.summary()["fields"] == {"intent": 0.25, "order": 0.5}
    without = measure("json_fields", answers, references)
    assert without.values == (1.0, 0.5, 0.0, 0.0) and without.details["fields"]["order"] == 1 / 3
    valid = measure("json_schema", answers, references, Settings(schema=schema))
    assert valid.per_row == (True, True, False, False)


def test_a_classification_equals_scikit_learn_s_by_hand():
    references = ["a", "a", "b", "b", "c"]
    answers = [" a", "b", "b", "b\n", "A cat"]
    measured = measure("classification", answers, references)
    assert measured.value == 3 / 5
    # F1 of a: 2 * 1 / (2 + 1); of b: 2 * 2 / (2 + 3); of c: 0.
    assert measured.details["macro_f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    assert measured.details["confusion"] == {"a": {"a": 1, "b": 1}, "b": {"b": 2}, "c": {OTHER: 1}}
    low, high = measured.details["macro_f1_interval"]
    assert 0 <= low < measured.details["macro_f1"] < high <= 1


def test_macro_f1_of_many_draws_is_that_of_each():
    generator = np.random.default_rng(0)
    right, said = generator.integers(0, 3, (2, 5, 30))
    said[0, 0] = 3
    together = metrics._macro_f1(right, said, 3)
    for draw in range(5):
        assert together[draw] == metrics._macro_f1(right[draw : draw + 1], said[draw : draw + 1], 3)[0]


def test_a_regular_expression_compares_its_group_in_the_last_match():
    settings = Settings(pattern=r"#### *(-?\d+)")
    answers = ["1 + 1 = 2\n#### 2", "#### 3 no, #### 4", "four", "#### 5"]
    measured = measure("regex", answers, ["so #### 2", "#### 4", "#### 4", "####6"], settings)
    assert measured.per_row == (True, True, False, False)
    plain = measure("regex", ["Dear Sir,", "Hi"], ["x", "y"], Settings(pattern="^Dear"))
    assert plain.per_row == (True, False)
    with pytest.raises(DataError, match=r"row 2 does not match eval.pattern"):
        check("regex", ["#### 1", "one"], ["row 1", "row 2"], settings=settings)


def chrf_by_hand(answer, reference, orders=6, beta=2):
    """Popovic 2015: mean precision and recall of the n-grams of letters, without white space, up to six."""
    sides = []
    for n in range(1, orders + 1):
        own, right = (
            Counter(text[i : i + n] for i in range(len(text) - n + 1))
            for text in (answer.replace(" ", ""), reference.replace(" ", ""))
        )
        sides.append(((own & right).total() / own.total(), (own & right).total() / right.total()))
    precision, recall = np.mean(sides, axis=0)
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def test_rouge_and_chrf_are_those_of_their_libraries_and_of_a_hand():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(list(metrics.ROUGE))
    pytest.importorskip("sacrebleu")
    answers, references = ["the cat sat", "dogs bark loud"], ["the cat is on the mat", "dogs bark loudly"]
    scored = [scorer.score(*pair) for pair in zip(references, answers, strict=True)]
    # 2 of 3 and of 6 words, 1 of 2 and of 5 pairs of words, and a longest common part of 2 words.
    by_hand = {"rouge1": 4 / 9, "rouge2": 2 / 7, "rougeL": 4 / 9}
    for name, first in by_hand.items():
        measured = measure(name, answers, references)
        assert measured.values == tuple(one[name].fmeasure for one in scored) and not measured.passes
        assert measured.values[0] == pytest.approx(first)
    expected = [chrf_by_hand(*pair) for pair in zip(answers, references, strict=True)]
    assert measure("chrf", answers, references).values == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "library"), [("rouge1", "rouge_score"), ("chrf", "sacrebleu"), ("json_schema", "jsonschema")]
)
def test_an_absent_library_is_named_with_its_command(monkeypatch, name, library):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    with pytest.raises(ConfigError, match=rf"{library}: pip install 'jaxft\[metrics\]'"):
        Metrics.of(EvalConfig(metric=name, schema="schema.json"))


def test_references_that_nothing_compares_with_are_refused(schema):
    with pytest.raises(DataError, match=r"reference 2 of 2 has no field: it is not a JSON object"):
        check("json_fields", ['{"a": 1}', "[1]"])
    with pytest.raises(DataError, match=r"reference 1 of 1 does not fit .*'no' is not one of"):
        check("json_schema", ['{"intent": "no"}'], settings=Settings(schema=schema))
    with pytest.raises(DataError, match="row 7 is empty"):
        check("classification", [" "], ["row 7"])
    with pytest.raises(ConfigError, match="unknown metric 'bleu': the metrics are exact_match"):
        check("bleu", ["a"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds a list, no object"),
        ("{", "cannot be read"),
        ('{"type": 3}', "is no JSON Schema"),
        ('{"properties": {"a": {"pattern": "("}}}', "is no JSON Schema"),
        ('{"intent": "refund", "order": 3}', r"none of its keys \(intent, order\) is a keyword"),
        ("{}", "it has none"),
        ('{"properties": {"a": {"$ref": "#/$defs/absent"}}}', "refers to '#/\\$defs/absent', which it does not hold"),
        (
            '{"type": "object", "anyOf": [{"$ref": "https://example.org/x.json"}]}',
            "refers to 'https://example.org/x.json'",
        ),
    ],
)
def test_a_file_that_is_no_schema_is_refused(tmp_path, text, message):
    (tmp_path / "schema.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_schema(str(tmp_path / "schema.json"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_schema(str(tmp_path / "absent.json"))


def test_a_schema_may_refer_to_its_own_parts_and_not_to_itself_without_end(tmp_path):
    whole = {"$ref": "#/$defs/one", "$defs": {"one": {"type": "object", "properties": {"$ref": {"type": "string"}}}}}
    for value, text, fits in ((whole, '{"$ref": "x"}', True), (whole, "[]", False)):
        (tmp_path / "schema.json").write_text(json.dumps(value))
        assert (load_schema(str(tmp_path / "schema.json")).problem(text) is None) == fits
    (tmp_path / "schema.json").write_text('{"$ref": "#"}')
    with pytest.raises(ConfigError, match="refers to itself without end"):
        load_schema(str(tmp_path / "schema.json")).problem("{}")
    hidden = Schema(source="s.json", value={"$defs": {"a": {"$id": "a"}}, "$ref": "https://example.org/x.json"})
    with pytest.raises(ConfigError, match="no other file or address is read"):
        hidden.problem("{}")


def test_answers_of_no_list_are_no_classes():
    answers = [f"label {number}" for number in range(ENOUGH_FOR_CLASSES)]
    with pytest.raises(DataError, match="all 50 are different, so that there is no such list"):
        check("classification", answers)
    check("classification", answers[:-1])
    check("classification", [*answers, answers[3]])


def test_each_of_several_metrics_has_its_interval_at_the_ends_too(schema):
    answers, references = ['{"a": 1}', "no"], ['{"a": 1, "b": 2}'] * 2
    names = ("json_exact", "json_valid", "json_fields", "classification", "regex")
    for given in (answers, ["no", "no"], references):
        for name in names:
            one = measure(name, given, references, Settings(pattern="1"))
            low, high = one.summary()["interval"]
            assert 0 <= low <= one.value <= high <= 1 and low < high, name
    nothing = measure("json_fields", ["no"] * 30, ['{"a": 1}'] * 30)
    assert (
        nothing.interval() == wilson_interval(0, 30) and measure("json_fields", ['{"a": 3}'], ['{"a": 3}']).interval()
    )
    assert Measured(name="x", values=(0.5, 0.5), passes=False).interval() is None


def test_a_schema_without_its_library_is_refused(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("jsonschema"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match="eval.schema needs the library jsonschema"):
        load_schema(str(tmp_path / "schema.json"))


FUNCTIONS = """
def half(completions, reference, **_):
    return [0.5 if one == right else 0 for one, right in zip(completions, reference)]

def same(completions, reference):
    return [one == right for one, right in zip(completions, reference)]

def late(completions):
    return [None for _ in completions]

def other(completions, price):
    return [1 for _ in completions]

def not_a_number(completions, **_):
    return [float("nan")] * len(completions)

def of_one(completions, reference):
    return completions == reference

def by_position(completion, reference, /):
    return [1]

def shorter(completions):
    return [1]

def raises(completions):
    return [len(one["content"]) for one in completions]
"""


def test_functions_of_a_file_are_metrics(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    both = Metrics.of(EvalConfig(metric=f"exact_match,{path}:half,{path}:same"))
    both.check(["a", "b"])
    exact, half, same = both.measure(["p", "p"], ["a", "x"], ["a", "b"])
    assert (half.name, half.values, half.passes) == ("half", (0.5, 0.0), False)
    assert (same.name, same.per_row) == ("same", (True, False)) and exact.per_row == same.per_row
    content = json.dumps(both.content())
    path.write_text(FUNCTIONS + "\n")
    assert json.dumps(both.content()) != content


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other", "metric other of .*mine.py needs 'price'"),
        ("absent", "metric absent of .*mine.py cannot be imported"),
        ("late", "late gave no number"),
        ("not_a_number", r"metric not_a_number of .*mine.py returned nan as a score. It must be a finite number\.$"),
        ("of_one", r"a value of type bool for 1 answers. It must return a list with one number for each answer\."),
        ("by_position", "metric by_position of .* takes nothing by name"),
        ("shorter", "returned 1 rewards for 3 answers"),
        ("raises", "metric raises of .*raised on answer 0 of the held-out rows"),
    ],
)  # fmt: skip
def test_a_function_that_is_no_metric_is_refused_before_anything_is_answered(tmp_path, name, message, monkeypatch):
    monkeypatch.setattr(measuring, "WORKERS", 1)
    monkeypatch.setattr(measuring, "TRIED", 3 if name == "shorter" else 1)
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    with pytest.raises(ConfigError, match=message):
        Metrics.of(EvalConfig(metric=f"{tmp_path}/mine.py:{name}")).check(["a", "b", "c"])


def test_a_function_without_its_file_and_one_that_fails_later_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="eval.metric: there is no file '.*absent.py'"):
        Metrics.of(EvalConfig(metric=f"{tmp_path}/absent.py:half"))
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    with pytest.raises(DataError, match=r"late gave no score to 2 of 2 held-out answers \(rows 0, 1\)"):
        Metrics.of(EvalConfig(metric=f"{tmp_path}/mine.py:late")).measure(["p"] * 2, ["a", "x"], ["a", "b"])
