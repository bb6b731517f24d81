"""Pairs of rows that are near duplicates: candidates by MinHash, each verified by its true Jaccard similarity."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxft.data.deep.minhash import BAND, buckets
from jaxft.data.deep.table import Table
from jaxft.data.deep.texts import RowText, Texts
from jaxft.data.deep.words import NEAR, grams_of, jaccard, words_of

MOST = 64  # rows of a bucket that one row is compared with
KEPT = 8_192  # rows whose n-grams are kept for the next comparison
TRIED = 1_000_000  # pairs that are remembered as not near


class Near(NamedTuple):
    """Two rows by their indices, the first before the second, and their Jaccard similarity; 1 if they are equal."""

    first: int
    second: int
    similarity: float


class Compared:
    """The true Jaccard similarity of rows, by their questions or as a whole.

    part: `user` or `whole`. Whole rows are near duplicates only if their answers alone are: a long question that is
    asked twice and answered otherwise is no duplicate.
    """

    def __init__(self, texts: Texts, table: Table, part: str) -> None:
        self.table, self.part = table, part
        self.signatures = table.user_signatures if part == "user" else table.signatures
        own = self._of_question if part == "user" else self._of_row
        self._grams = functools.lru_cache(maxsize=KEPT)(lambda index: own(texts.known(index)))

    def similarity(self, first: int, second: int) -> float:
        """Of two rows, from 0 to 1; 0 for whole rows whose answers are not near."""
        (own, own_answer), (other, other_answer) = self._grams(first), self._grams(second)
        if own_answer != other_answer and jaccard(own_answer, other_answer) < NEAR:
            return 0.0
        return jaccard(own, other)

    def _of_question(self, text: RowText) -> tuple[set[str], set[str]]:
        return self.table.templates.user_grams(text), set()

    def _of_row(self, text: RowText) -> tuple[set[str], set[str]]:
        return self.table.templates.whole_grams(text), grams_of(words_of(text.answer or ""))

    @property
    def keys(self) -> np.ndarray:
        """By what rows are exact duplicates, uint64 [N]; 0 for a row without such a text.

        A short question, such as "go on", is the same only after the same messages.
        """
        table = self.table
        if self.part == "whole":
            return table.whole
        mixed = table.user ^ (table.before * np.uint64(0x9E3779B97F4A7C15))
        return np.where(table.short & (table.user != 0), mixed, table.user)

    @property
    def separate(self) -> np.ndarray:
        """Rows with other values of it are no near duplicates, uint64 [N].

        Of whole rows, and of short questions, the messages before the question.
        """
        table = self.table
        if self.part == "whole":
            return table.before
        return np.where(table.short, table.before, np.uint64(0))


def exact_pairs(keys: np.ndarray, rows: np.ndarray) -> list[Near]:
    """Each row whose key an earlier row has, with the first of these. rows: indices, ascending. Keys of 0 are none."""
    rows = rows[keys[rows] != 0]
    order = rows[np.argsort(keys[rows], kind="stable")]
    starts = np.flatnonzero(np.concatenate([[True], np.diff(keys[order]) != 0])) if len(order) else np.array([], int)
    firsts = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
    return sorted(Near(int(first), int(row), 1.0) for first, row in zip(firsts, order, strict=True) if first != row)


def distinct(compared: Compared, rows: np.ndarray) -> np.ndarray:
    """The first of the rows that are exact duplicates, without those that have no words to compare. rows: ascending."""
    rows = rows[compared.keys[rows] != 0]
    rows = rows[np.asarray(compared.signatures[rows, :BAND]).any(axis=1)]
    _, first = np.unique(compared.keys[rows], return_index=True)
    return rows[np.sort(first)]


def near_pairs(compared: Compared, rows: np.ndarray) -> list[Near]:
    """Each row that is a near duplicate of an earlier one, with that one. rows: different ones, ascending.

    The earlier row is none that is a near duplicate itself when the two are compared.
    """
    linked: dict[int, Near] = {}
    tried: set[tuple[int, int]] = set()
    for bucket in buckets(compared.signatures, rows, compared.separate):
        roots: list[int] = []
        for row in bucket.tolist():
            if row in linked:
                continue
            near = _nearest(compared, roots, row, tried)
            if near is None:
                roots.append(row)
            else:
                linked[row] = near
    return sorted(linked.values(), key=lambda near: (near.first, near.second))


def _nearest(compared: Compared, roots: list[int], row: int, tried: set[tuple[int, int]]) -> Near | None:
    """The first of the last roots that a row is near to. tried: pairs that are not near."""
    for root in roots[-MOST:]:
        if (root, row) in tried:
            continue
        if (similarity := compared.similarity(root, row)) >= NEAR:
            return Near(root, row, similarity)
        _remember(tried, (root, row))
    return None


def _remember(tried: set[tuple[int, int]], pair: tuple[int, int]) -> None:
    if len(tried) >= TRIED:  # forgetting costs time alone
        tried.clear()
    tried.add(pair)


def near_across(compared: Compared, rows: np.ndarray, train: int) -> Iterator[Near]:
    """Near duplicates of a training row, first, and a held-out row, second, each pair once.

    rows: different ones, ascending. train: the number of training rows.
    """
    tried: set[tuple[int, int]] = set()
    for bucket in buckets(compared.signatures, rows, compared.separate):
        split = int(np.searchsorted(bucket, train))
        for second in bucket[split:].tolist():
            for first in bucket[:split][:MOST].tolist():
                if (first, second) in tried:
                    continue
                _remember(tried, (first, second))
                if (similarity := compared.similarity(first, second)) >= NEAR:
                    yield Near(first, second, similarity)
