"""Scores of generated answers against references: plain text in, counts out.

Every metric strips the white space around both texts and tolerates nothing else: an answer in a code fence, or with a
remark after it, is not JSON, because a program that parses it would fail.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jaxft.errors import ConfigError, DataError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Score:
    """The number of answers that passed one metric. per_row: whether each answer passed, in the given order."""

    metric: str
    correct: int
    total: int
    per_row: tuple[bool, ...]

    @property
    def value(self) -> float:
        """The share of the answers that passed, from 0 to 1."""
        return self.correct / self.total


def score(metric: str, answers: Sequence[str], references: Sequence[str]) -> Score:
    """Score of the answers, each against the reference of the same row.

    metric:
        exact_match: the same text.
        json_valid: one strict JSON value (no NaN, no key twice in an object); the reference is not used.
        json_exact: strict JSON equal to the reference's: the same keys and values. The order of keys, white space, and
            1 for 1.0 do not matter; 1 for true or "1" does.

    Raises ConfigError for an unknown metric; DataError if there are no answers, if the two lengths differ and, for
    json_exact, if a reference is not JSON.
    """
    passes = _METRICS.get(metric)
    if passes is None:
        known = ", ".join(_METRICS)
        raise ConfigError(f"unknown metric {metric!r}: the metrics are {known}.{did_you_mean(metric, _METRICS)}")
    _check_pairs(answers, references)
    if metric == "json_exact":
        for row in range(len(references)):
            _parse_reference(references, row)
    per_row = tuple(passes(answer, reference) for answer, reference in zip(answers, references, strict=True))
    return Score(metric=metric, correct=sum(per_row), total=len(per_row), per_row=per_row)


def json_fields(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """For each key of the references, the share of the rows with this key in which the answer has the same value.

    Keys are in the order of their first appearance. An answer that is not a strict JSON object has no field right.
    Keys that only the answer has are not counted, so 1.0 for every key does not imply a json_exact of 1.0.

    Raises DataError if there are no answers, the two lengths differ, or a reference is not a JSON object.
    """
    _check_pairs(answers, references)
    right: dict[str, int] = {}
    total: dict[str, int] = {}
    for row, answer in enumerate(answers):
        reference = _parse_reference(references, row)
        if not isinstance(reference, dict):
            raise DataError(
                f"reference {row + 1} of {len(references)} is not a JSON object, so it has no fields to compare: "
                f"{_quote(references[row])}. Score it with json_exact instead."
            )
        fields = _object_or_empty(answer)
        for key, value in reference.items():
            total[key] = total.get(key, 0) + 1
            right[key] = right.get(key, 0) + (key in fields and _equal(fields[key], value))
    return {key: right[key] / total[key] for key in total}


def _exact_match(answer: str, reference: str) -> bool:
    return answer.strip() == reference.strip()


def _json_valid(answer: str, reference: str) -> bool:
    return _is_json(answer)


def _json_exact(answer: str, reference: str) -> bool:
    return _is_json(answer) and _equal(_parse(answer), _parse(reference))


_METRICS: dict[str, Callable[[str, str], bool]] = {
    "exact_match": _exact_match,
    "json_valid": _json_valid,
    "json_exact": _json_exact,
}


def _check_pairs(answers: Sequence[str], references: Sequence[str]) -> None:
    if len(answers) != len(references):
        raise DataError(
            f"{len(answers)} answers for {len(references)} references: each answer is scored against the reference "
            "of the same row. Give one reference for each answer."
        )
    if not answers:
        raise DataError("there are no answers to score, so there is no score. Give at least one row.")


def _parse(text: str) -> Any:
    """The value of strict JSON text. Raises ValueError, or RecursionError if it is nested too deeply."""
    return json.loads(text.strip(), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)


def _refuse_constant(name: str) -> NoReturn:
    # Python's parser accepts NaN and Infinity, which are not JSON.
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python's parser keeps the last of two equal keys, so a right value could hide a wrong one.
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object has the same key twice")
    return fields


def _is_json(text: str) -> bool:
    try:
        _parse(text)
    except (ValueError, RecursionError):
        return False
    return True


def _object_or_empty(text: str) -> dict[str, Any]:
    value = _parse(text) if _is_json(text) else None
    return value if isinstance(value, dict) else {}


def _parse_reference(references: Sequence[str], row: int) -> Any:
    try:
        return _parse(references[row])
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"reference {row + 1} of {len(references)} is not JSON ({error}): {_quote(references[row])}. "
            "Mend the row, or score with exact_match."
        ) from error


def _quote(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _equal(a: Any, b: Any) -> bool:
    """Equality of JSON values: in Python True == 1, in JSON true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b
