"""Rows of an odd shape: very long, empty, cut off, in another script, or not in the format that answers have."""

# N rows

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.data.deep.cuts import CUTS, PROSE, SENTENCE
from jaxft.data.deep.table import Table
from jaxft.files.strict_json import parse_json

MADS = 5  # median absolute deviations above the median, beyond which a text is long
LEAST_MAD = 0.1  # of the median: where nearly all lengths are the same, a small difference is nothing odd
RARE_SCRIPT = 0.02  # share of the rows below which a script is rare
MAJORITY = 0.9  # share of the answers that makes a format
PARTS = ("question", "answer")


@dataclass(frozen=True, kw_only=True)
class Odd:
    """A training row with an odd shape. kind: `long`, `empty`, `cut`, `script` or `format`. text: what is odd."""

    row: int
    kind: str
    text: str


def odd_shapes(table: Table, answer_of: Callable[[int], str], metric: str | None) -> list[Odd]:
    """The odd training rows, by row. answer_of: the answer of a row. metric: `eval.metric`, whose format answers have.

    Without a metric answers have the format of JSON objects if nine tenths of them do.
    """
    odd = [*_empty(table), *_long(table), *_cut(table), *_scripts(table), *_formats(table, answer_of, metric)]
    return sorted(odd, key=lambda one: (one.row, one.kind))


def _empty(table: Table) -> Iterator[Odd]:
    for column, part in enumerate(PARTS):
        for row in np.flatnonzero(table.lengths[: table.train, column] == 0).tolist():
            yield Odd(row=row, kind="empty", text=f"its {part} is empty")


def _long(table: Table) -> Iterator[Odd]:
    for column, part in enumerate(PARTS):
        lengths_N = table.lengths[: table.train, column]
        if column and closed_list(table):
            continue
        rows = np.flatnonzero(lengths_N > 0)
        if not len(rows):
            continue
        median = float(np.median(lengths_N[rows]))
        mad = max(float(np.median(np.abs(lengths_N[rows] - median))), LEAST_MAD * median)
        limit = median + MADS * mad
        for row in rows[lengths_N[rows] > limit].tolist():
            text = (
                f"its {part} has {lengths_N[row]:,} characters; the median is {median:,.0f}, and {limit:,.0f} is long"
            )
            yield Odd(row=row, kind="long", text=text)


def closed_list(table: Table) -> bool:
    """Whether answers are from a short list: each is there five times on average, and there are two or more."""
    answers_N = table.answer[: table.train]
    answers_N = answers_N[answers_N != 0]
    different = len(np.unique(answers_N))
    return 1 < different <= len(answers_N) / 5


def _cut(table: Table) -> Iterator[Odd]:
    cut_N, lengths_N = table.cut[: table.train], table.lengths[: table.train, 1]
    prose = int(np.count_nonzero(lengths_N >= PROSE))
    open_ends = int(np.count_nonzero(cut_N == SENTENCE))
    for row in np.flatnonzero(cut_N >= 0).tolist():
        if cut_N[row] != SENTENCE or open_ends <= (1 - MAJORITY) * prose:
            yield Odd(row=row, kind="cut", text=f"its answer seems cut off: {CUTS[cut_N[row]]}")


def _scripts(table: Table) -> Iterator[Odd]:
    for column, part in enumerate(PARTS):
        scripts_N = table.scripts[: table.train, column]
        counts = Counter(scripts_N[scripts_N >= 0].tolist())
        total = counts.total()
        rare = {script for script, count in counts.items() if count <= RARE_SCRIPT * total}
        most = counts.most_common(1)[0][0] if counts else -1
        for row in np.flatnonzero(np.isin(scripts_N, list(rare))).tolist():
            own, common = (table.script_names[script].lower() for script in (scripts_N[row], most))
            yield Odd(row=row, kind="script", text=f"its {part} is in {own} script, and most are in {common}")


def _formats(table: Table, answer_of: Callable[[int], str], metric: str | None) -> Iterator[Odd]:
    """Answers that are no JSON where the others are, or have other keys than nine tenths of the objects."""
    rows = np.flatnonzero(table.answer[: table.train] != 0).tolist()
    counts = Counter(_keys(_strict(answer_of(row))[0]) for row in rows)
    objects = sum(count for keys, count in counts.items() if keys is not None)
    if not ("json" in (metric or "") or (metric is None and objects >= MAJORITY * max(len(rows), 1))):
        return
    usual = max((keys for keys in counts if keys is not None), key=lambda keys: counts[keys], default=None)
    if usual is not None and counts[usual] < MAJORITY * objects:
        usual = None
    for row in rows:
        value, problem = _strict(answer_of(row))
        if problem is not None:
            yield Odd(row=row, kind="format", text=f"its answer is not strict JSON: {problem}")
        elif usual is not None and _keys(value) != usual:
            yield Odd(row=row, kind="format", text=_other_keys(_keys(value), usual))


def _keys(value: Any) -> tuple[str, ...] | None:
    """The keys of an object in order; None for any other value."""
    return tuple(sorted(value)) if isinstance(value, dict) else None


def _other_keys(own: tuple[str, ...] | None, usual: tuple[str, ...]) -> str:
    if own is None:
        return "its answer is JSON, but no object as the others are"
    lacks, more = sorted(set(usual) - set(own)), sorted(set(own) - set(usual))
    parts = [f"lacks {', '.join(lacks)}" if lacks else "", f"has {', '.join(more)} more" if more else ""]
    return f"its answer {' and '.join(part for part in parts if part)}"


def _strict(answer: str) -> tuple[Any, str | None]:
    """(the value of strict JSON, None), or (None, what is wrong)."""
    try:
        return parse_json(answer.strip(), finite=True), None
    except (ValueError, RecursionError) as error:
        return None, str(error)
