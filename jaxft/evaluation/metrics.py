"""The metrics of `eval.metric`: a number for every answer, their mean with its interval, and figures of parts."""

# N answers, L labels

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxft.errors import ConfigError, DataError, listed
from jaxft.evaluation.json_answers import FieldCounts, Schema, row_fields
from jaxft.evaluation.scoring import NAMED, PASSED, check_references, score
from jaxft.evaluation.statistics import Interval, bca_interval, wilson_interval

OTHER = "(none of the labels)"
DRAWS_OF_F1 = 2_000
ENOUGH_FOR_CLASSES = 50  # answers of which two are the same if there is a list of classes, even of a hundred and more
ROUGE = ("rouge1", "rouge2", "rougeL")
LIBRARIES = {**dict.fromkeys(ROUGE, "rouge_score"), "chrf": "sacrebleu", "json_schema": "jsonschema"}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One metric of N answers.

    values: of each answer; of a metric that an answer passes or not, 0 or 1. details: figures of parts, as they are
    written to scores.json.
    """

    name: str
    values: tuple[float, ...]
    passes: bool
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The mean over the answers."""
        return sum(self.values) / len(self.values)

    @property
    def correct(self) -> int | None:
        """The number of answers that passed; None for a metric that is a number."""
        return int(sum(self.values)) if self.passes else None

    @property
    def per_row(self) -> tuple[bool | float, ...]:
        """The values as they are written: true or false if an answer passes or not."""
        return tuple(bool(value) for value in self.values) if self.passes else self.values

    def interval(self) -> Interval | None:
        """The 95% interval of the mean: Wilson's of a share, else BCa; None if all values of a number are the same.

        If they are all 0 or all 1, the ends of what a metric gives, Wilson's interval holds for their mean too: of all
        numbers from 0 to 1 with a given mean, a share is at an end the most often.
        """
        if self.passes or set(self.values) in ({0.0}, {1.0}):
            return wilson_interval(int(sum(self.values)), len(self.values))
        return bca_interval(self.values)

    def summary(self) -> dict[str, Any]:
        """The entry of scores.json."""
        counted = {} if self.correct is None else {"correct": self.correct}
        interval = self.interval()
        return {
            **counted,
            "total": len(self.values),
            "value": self.value,
            "interval": None if interval is None else list(interval),
            **self.details,
        }


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What some metrics read. schema: of json_schema and json_fields. pattern: of regex, a regular expression."""

    schema: Schema | None = None
    pattern: str | None = None


def measure(name: str, answers: Sequence[str], references: Sequence[str], settings: Settings | None = None) -> Measured:
    """A metric of N answers, each against the reference of the same row.

    name: one of `METRICS`. Raises ConfigError for another one, and for one whose library is not installed; DataError as
    `check` does.
    """
    settings = settings or Settings()
    check(name, references, settings=settings)
    return METRICS[name](name, list(answers), list(references), settings)


def check(name: str, references: Sequence[str], names: Sequence[str] = (), *, settings: Settings | None = None) -> None:
    """Raises ConfigError if a metric cannot be computed here, DataError if it can compare with some references never.

    names: of the rows, in messages.
    """
    settings = settings or Settings()
    if name not in METRICS:
        raise ConfigError(f"unknown metric {name!r}: the metrics are {', '.join(METRICS)}")
    require(name)
    if name in PASSED:
        check_references(name, references, names)
        return
    wrong = []
    for row, text in enumerate(references):
        problem = "is empty" if not text.strip() else _problem(name, text, settings)
        if problem is not None:
            wrong.append(f"{names[row] if names else f'reference {row + 1} of {len(references)}'} {problem}")
    if wrong:
        raise DataError(
            f"{len(wrong):,} of {len(references):,} held-out answers cannot be scored by {name}:\n"
            f"{listed(wrong, NAMED, lines=True)}\nMend these rows, remove them from the held-out set, or leave {name} "
            "out of eval.metric."
        )
    if name == "classification":
        _check_classes(references)


def _check_classes(references: Sequence[str]) -> None:
    """Raises DataError for answers that are from no list of classes: many, and no two the same."""
    if len(references) >= ENOUGH_FOR_CLASSES and len({text.strip() for text in references}) == len(references):
        raise DataError(
            f"classification takes the held-out answers for its list of classes, and all {len(references):,} are "
            "different, so that there is no such list. Score free text by exact_match, rougeL or chrf, and JSON by "
            "json_fields."
        )


def require(name: str) -> None:
    """Raises ConfigError, with the command that installs it, if the library of a metric is absent."""
    library = LIBRARIES.get(name)
    if library is None:
        return
    from importlib.util import find_spec

    if find_spec(library) is None:
        raise ConfigError(f"eval.metric={name!r} needs the library {library}: pip install 'jaxft[metrics]'")


def _problem(name: str, reference: str, settings: Settings) -> str | None:
    """What keeps a reference from being compared with; None if nothing does."""
    if name == "json_fields" and not row_fields(reference, reference, settings.schema).keys:
        return "has no field: it is not a JSON object, or an empty one"
    if name == "json_schema" and settings.schema is not None:
        return settings.schema.problem(reference)
    if name == "regex" and _expression(settings).groups and _extracted(reference, settings) is None:
        return f"does not match eval.pattern={settings.pattern!r}"
    return None


def _json_schema(name: str, answers: list[str], references: list[str], settings: Settings) -> Measured:
    schema = settings.schema
    if schema is None:
        raise ConfigError("json_schema needs a schema: set eval.schema to a file with a JSON Schema")
    values = _numbers([schema.problem(answer) is None for answer in answers])
    details = FieldCounts.of(answers, references, schema).summary()
    return Measured(name=name, values=values, passes=True, details=details)


def _json_fields(name: str, answers: list[str], references: list[str], settings: Settings) -> Measured:
    rows = [row_fields(*pair, settings.schema) for pair in zip(answers, references, strict=True)]
    values = tuple(len(row.right) / len(row.keys) for row in rows)
    details = FieldCounts.of(answers, references, settings.schema).summary()
    return Measured(name=name, values=values, passes=False, details=details)


def _classification(name: str, answers: list[str], references: list[str], settings: Settings) -> Measured:
    given = [answer.strip() for answer in answers]
    right = [reference.strip() for reference in references]
    labels = sorted(set(right))
    number = {label: index for index, label in enumerate(labels)}
    right_N = np.array([number[label] for label in right])
    given_N = np.array([number.get(label, len(labels)) for label in given])

    def macro_f1(rows: np.ndarray, axis: int = -1) -> np.ndarray:
        return _macro_f1(right_N[rows], given_N[rows], len(labels))

    rows = np.arange(len(right))
    interval = bca_interval(rows, macro_f1, draws=DRAWS_OF_F1) if len(rows) > 1 else None
    confusion: dict[str, dict[str, int]] = {label: {} for label in labels}
    for expected, text in zip(right, given, strict=True):
        label = text if text in number else OTHER
        confusion[expected][label] = confusion[expected].get(label, 0) + 1
    details = {
        "macro_f1": float(macro_f1(rows[None])[0]),
        "macro_f1_interval": None if interval is None else list(interval),
        "confusion": confusion,
    }
    return Measured(name=name, values=_numbers(right_N == given_N), passes=True, details=details)


def _macro_f1(right: np.ndarray, given: np.ndarray, labels: int) -> np.ndarray:
    """Mean F1 over the labels, of rows [..., N] of numbers of labels; an answer of no label has the number `labels`.

    A label that occurs neither among the right ones nor among the answers of these rows has an F1 of 0.
    """
    total = np.zeros(right.shape[:-1])
    for label in range(labels):
        is_right, is_given = right == label, given == label
        hits = (is_right & is_given).sum(-1)
        both = is_right.sum(-1) + is_given.sum(-1)
        total += np.divide(2 * hits, both, out=np.zeros(total.shape), where=both > 0)
    return total / labels


def _regex(name: str, answers: list[str], references: list[str], settings: Settings) -> Measured:
    has_group = bool(_expression(settings).groups)
    passed = []
    for answer, reference in zip(answers, references, strict=True):
        own = _extracted(answer, settings)
        passed.append(own is not None and (not has_group or own == _extracted(reference, settings)))
    return Measured(name=name, values=_numbers(passed), passes=True)


def _expression(settings: Settings) -> re.Pattern[str]:
    if settings.pattern is None:
        raise ConfigError("regex needs a pattern: set eval.pattern to a regular expression")
    return re.compile(settings.pattern)


def _extracted(text: str, settings: Settings) -> str | None:
    """What the first group of the last match of the pattern holds, or the whole match if it has no group."""
    expression = _expression(settings)
    matches = list(expression.finditer(text.strip()))
    if not matches:
        return None
    return (matches[-1].group(1) or "").strip() if expression.groups else matches[-1].group()


def _rouge(name: str, answers: list[str], references: list[str], settings: Settings) -> Measured:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], use_stemmer=False)
    pairs = zip(answers, references, strict=True)
    values = tuple(float(scorer.score(reference, answer)[name].fmeasure) for answer, reference in pairs)
    return Measured(name=name, values=values, passes=False)


def _chrf(name: str, answers: list[str], references: list[str], settings: Settings) -> Measured:
    from sacrebleu.metrics import CHRF

    scorer = CHRF()
    pairs = zip(answers, references, strict=True)
    values = tuple(scorer.sentence_score(answer, [reference]).score / 100 for answer, reference in pairs)
    return Measured(name=name, values=values, passes=False)


def _passed(name: str, answers: list[str], references: list[str], settings: Settings) -> Measured:
    details = FieldCounts.of(answers, references).summary() if name.startswith("json") else {}
    return Measured(name=name, values=_numbers(score(name, answers, references).per_row), passes=True, details=details)


def _numbers(passed: Sequence[bool] | np.ndarray) -> tuple[float, ...]:
    return tuple(float(one) for one in passed)


METRICS: dict[str, Callable[[str, list[str], list[str], Settings], Measured]] = {
    **dict.fromkeys(PASSED, _passed),
    "json_schema": _json_schema,
    "json_fields": _json_fields,
    "classification": _classification,
    "regex": _regex,
    **dict.fromkeys(ROUGE, _rouge),
    "chrf": _chrf,
}
