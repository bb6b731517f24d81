"""Scores of generated answers against references: plain text in, counts out.

Every metric strips the white space around both texts and tolerates nothing else: an answer in a code fence, or with a
remark after it, is not JSON, because a program that parses it would fail.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxft.errors import ConfigError, DataError, did_you_mean, listed
from jaxft.evaluation.json_answers import FieldCounts, equal, is_json, not_json, parse

NAMED = 20  # rows named in one error


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

    Raises ConfigError for an unknown metric; DataError if there are no answers, if the two lengths differ, and for
    references as `check_references` does.
    """
    passes = _metric(metric)
    _check_pairs(answers, references)
    check_references(metric, references)
    per_row = tuple(passes(answer, reference) for answer, reference in zip(answers, references, strict=True))
    return Score(metric=metric, correct=sum(per_row), total=len(per_row), per_row=per_row)


def check_references(metric: str, references: Sequence[str], names: Sequence[str] = ()) -> None:
    """Raises DataError, with all of them, if no answer could be compared with some references.

    An empty one has nothing to be compared with, and one that is not strict JSON cannot be scored by json_exact;
    json_valid reads no reference. names: of their rows, in messages. Raises ConfigError for an unknown metric.
    """
    _metric(metric)
    wrong: list[str] = []
    for row, text in enumerate(references):
        where = names[row] if names else f"reference {row + 1} of {len(references)}"
        if metric != "json_valid" and not text.strip():
            wrong.append(f"{where} is empty")
        elif metric == "json_exact" and (problem := not_json(text)) is not None:
            wrong.append(f"{where} is not JSON ({problem}): {_quote(text)}")
    if wrong:
        raise DataError(
            f"{len(wrong):,} of {len(references):,} held-out answers cannot be scored by {metric}:\n"
            f"{listed(wrong, NAMED, lines=True)}\nMend these rows, remove them from the held-out set, or set "
            f"eval.metric to {'exact_match, which compares text, or to ' if metric == 'json_exact' else ''}None."
        )


def json_fields(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """For each key of the references, the share of the rows with this key in which the answer has the same value.

    Keys are in the order of their first appearance. An answer that is not a strict JSON object has no field right, and
    a reference that is none has no keys. Keys that only the answer has are not counted, so 1.0 for every key does not
    imply a json_exact of 1.0.

    Raises DataError if there are no answers, or the two lengths differ.
    """
    _check_pairs(answers, references)
    return FieldCounts.of(answers, references).shares()


def _exact_match(answer: str, reference: str) -> bool:
    return answer.strip() == reference.strip()


def _json_valid(answer: str, reference: str) -> bool:
    return is_json(answer)


def _json_exact(answer: str, reference: str) -> bool:
    return is_json(answer) and equal(parse(answer), parse(reference))


def _metric(name: str) -> Callable[[str, str], bool]:
    if name not in _METRICS:
        known = ", ".join(_METRICS)
        raise ConfigError(f"unknown metric {name!r}: the metrics are {known}.{did_you_mean(name, _METRICS)}")
    return _METRICS[name]


_METRICS: dict[str, Callable[[str, str], bool]] = {
    "exact_match": _exact_match,
    "json_valid": _json_valid,
    "json_exact": _json_exact,
}
PASSED = tuple(_METRICS)


def _check_pairs(answers: Sequence[str], references: Sequence[str]) -> None:
    if len(answers) != len(references):
        raise DataError(
            f"{len(answers)} answers for {len(references)} references: each answer is scored against the reference "
            "of the same row. Give one reference for each answer."
        )
    if not answers:
        raise DataError("there are no answers to score, so there is no score. Give at least one row.")


def _quote(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
