"""Duplicates within the training rows, and training rows that leak held-out ones."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxft.data.deep.similar import Compared, Near, distinct, exact_pairs, near_across, near_pairs
from jaxft.data.deep.table import Table
from jaxft.data.deep.texts import READ, Texts
from jaxft.data.deep.words import digest


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Training rows that repeat an earlier one, as pairs of both. near: without the exact ones.

    A pair of `near` is of rows that are no exact duplicates of earlier ones.
    """

    exact: list[Near]
    near: list[Near]

    @property
    def rows(self) -> set[int]:
        """The later rows of all pairs: without them, each row is in the set once."""
        return {pair.second for pair in (*self.exact, *self.near)}


@dataclass(frozen=True, kw_only=True)
class Leak:
    """A training row that shows a held-out one.

    kind: `exact` or `near` of the questions or of whole rows, or `words`: both questions have 13 words in a row.
    """

    train: int
    held_out: int
    kind: str
    similarity: float | None = None


def duplicates(compared: Compared, train: int) -> Duplicates:
    """The duplicates among the first `train` rows."""
    rows = np.arange(train)
    return Duplicates(exact=exact_pairs(compared.keys, rows), near=near_pairs(compared, distinct(compared, rows)))


def leaks(texts: Texts, table: Table, compared: list[Compared]) -> list[Leak]:
    """Training rows that are duplicates of held-out rows, or whose question shares 13 words in a row with one.

    Each pair is listed once, by the first kind that holds. compared: by what rows are compared.
    """
    if table.train in (0, len(table)):
        return []
    out: dict[tuple[int, int], Leak] = {}
    for one in compared:
        for pair in _exact_across(one.keys, table.train):
            out.setdefault(pair, Leak(train=pair[0], held_out=pair[1], kind="exact", similarity=1.0))
    for one in compared:
        for near in near_across(one, _distinct_sides(one, table), table.train):
            leak = Leak(train=near.first, held_out=near.second, kind="near", similarity=near.similarity)
            out.setdefault((near.first, near.second), leak)
    for pair in _shared_words(texts, table):
        out.setdefault(pair, Leak(train=pair[0], held_out=pair[1], kind="words"))
    return sorted(out.values(), key=lambda leak: (leak.held_out, leak.train))


def _distinct_sides(compared: Compared, table: Table) -> np.ndarray:
    rows = np.arange(len(table))
    sides = (distinct(compared, rows[: table.train]), distinct(compared, rows[table.train :]))
    return np.concatenate(sides)


def _exact_across(keys: np.ndarray, train: int) -> Iterator[tuple[int, int]]:
    """(training row, held-out row) with the same key. Of several training rows, all; a key of 0 is none."""
    held_out: dict[int, list[int]] = {}
    for row, key in enumerate(keys[train:].tolist(), train):
        if key:
            held_out.setdefault(key, []).append(row)
    hits = np.flatnonzero(np.isin(keys[:train], np.array(list(held_out), np.uint64)))
    for row in hits.tolist():
        for other in held_out[int(keys[row])]:
            yield row, other


def _shared_words(texts: Texts, table: Table) -> Iterator[tuple[int, int]]:
    """(training row, held-out row) whose questions share 13 words in a row that no template has."""
    held_out: dict[int, int] = {}  # of each n-gram's hash, the first row that has it
    for row in range(table.train, len(table)):
        for gram in _long_grams(texts, table, row):
            held_out.setdefault(gram, row)
    if not held_out:
        return
    for row in range(table.train):
        shared = {held_out[gram] for gram in _long_grams(texts, table, row) if gram in held_out}
        for other in sorted(shared):
            yield row, other


def _long_grams(texts: Texts, table: Table, row: int) -> Iterator[int]:
    try:
        text = texts[row]
    except READ:
        return
    if text is not None:
        yield from map(digest, table.templates.long_grams(text))
