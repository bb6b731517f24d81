"""Training rows that ask the same and answer otherwise."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.data.deep.similar import Compared, Near, exact_pairs
from jaxft.data.deep.table import Table
from jaxft.data.deep.texts import RowText, Texts
from jaxft.data.deep.words import NEAR, canonical, words_of

GROUP = 40  # rows with near questions that are compared with each other


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """Two rows with the same messages before a question, equal or near questions, and answers that differ.

    similarity: of the questions; 1 if they are equal.
    """

    first: int
    second: int
    similarity: float


def contradictions(texts: Texts, table: Table, compared: Compared, near: Sequence[Near]) -> list[Contradiction]:
    """The contradictions among training rows. compared: by questions; near: near duplicates by these.

    Of pairs of answers, two rows contradict each other if one chooses what the other rejects; of labelled answers, if
    the same answer is good and bad. Near questions that differ in a number, or by the words in which their answers
    differ, are no contradiction: the question explains the answer.
    """
    rows = np.flatnonzero(table.is_train & (table.user != 0) & (table.answer != 0))
    question = table.user ^ (table.before * np.uint64(0x9E3779B97F4A7C15))
    out: dict[tuple[int, int], Contradiction] = {}
    for group in _groups(exact_pairs(question, rows)):
        for first, second in _differing(table, group):
            out[first, second] = Contradiction(first=first, second=second, similarity=1.0)
    for group in _groups(near):
        for first, second in _differing(table, group):
            similarity = compared.similarity(first, second)
            if similarity >= NEAR and (first, second) not in out and not explained(texts, table, first, second):
                out[first, second] = Contradiction(first=first, second=second, similarity=similarity)
    return [out[pair] for pair in sorted(out)]


def _groups(pairs: Sequence[Near]) -> Iterator[list[int]]:
    """The rows that pairs join to the same first row, ascending."""
    members: defaultdict[int, list[int]] = defaultdict(list)
    for pair in pairs:
        members[pair.first].append(pair.second)
    for first, others in members.items():
        yield [first, *others]


def _differing(table: Table, group: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs of rows of a group that contradict each other if their questions are the same."""
    for at, second in enumerate(group):
        for first in group[max(0, at - GROUP) : at]:
            if table.before[first] == table.before[second] and _opposed(table, first, second):
                yield first, second


def _opposed(table: Table, first: int, second: int) -> bool:
    answer, rejected, label = table.answer, table.rejected, table.label
    if label[first] >= 0:
        return bool(answer[first] == answer[second] and label[first] != label[second])
    if rejected[first]:
        return bool(answer[first] == rejected[second] or answer[second] == rejected[first])
    return bool(answer[first] != answer[second])


def explained(texts: Texts, table: Table, first: int, second: int) -> bool:
    """Whether the questions of two rows differ in what makes their answers differ."""
    one, other = texts.known(first), texts.known(second)
    questions = _difference(one.user or "", other.user or "")
    if any(char.isdigit() for word in questions for char in word):
        return True
    if table.label[first] >= 0 or table.rejected[first]:
        return False
    answered = _difference(_answer(one), _answer(other))
    return bool(answered) and answered <= questions


def _answer(text: RowText) -> str:
    return canonical(text.answer or "")


def _difference(first: str, second: str) -> set[str]:
    return set(words_of(first)) ^ set(words_of(second))
