"""Which training rows stand before a question as its examples."""

# N rows, D width of a model

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import numpy as np

from jaxft.comparison.rows import WORD, Row
from jaxft.errors import ConfigError

# The vectors of N texts, [N, D] float32.
Embed = Callable[[Sequence[str]], np.ndarray]


class Chooser(Protocol):
    """Chooses examples for questions. name: in results."""

    name: str

    def examples(self, question: Row, k: int) -> list[Row]:
        """k examples for a question, in the order in which they stand before it."""

    def over(self, rows: Sequence[Row]) -> "Chooser":
        """The same way of choosing over other rows; examples that do not depend on the question stay the same."""


class Fixed:
    """The same k rows for every question, drawn by a seed; fewer rows are the first ones of more. draw: which set."""

    def __init__(self, rows: Sequence[Row], seed: int, draw: int = 0) -> None:
        self.name = f"fixed {draw + 1}"
        order = np.random.default_rng([seed, 2, draw]).permutation(len(rows))
        self._rows = [rows[index] for index in order]

    def examples(self, question: Row, k: int) -> list[Row]:
        """The first k of the drawn rows."""
        return self._rows[:k]

    def over(self, rows: Sequence[Row]) -> Self:
        """The same examples."""
        return self


class Bm25:
    """The k rows whose questions are most like the asked one by BM25, the most similar last.

    Source: Robertson and Zaragoza 2009, doi:10.1561/1500000019, as Lucene computes it, by the library bm25s. Of equal
    rows the first one is taken first.
    """

    name = "bm25"

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)
        words = [_words(row.question) for row in rows]
        self._index = _index_of(words) if any(words) else None

    def scores(self, text: str) -> np.ndarray:
        """The similarity of a text to every row, [N] float64; zeros where no word is shared."""
        if self._index is None:
            return np.zeros(len(self._rows))
        return np.asarray(self._index.get_scores_from_ids(self._index.get_tokens_ids(_words(text))))

    def examples(self, question: Row, k: int) -> list[Row]:
        """The k most similar rows, the most similar last."""
        best = np.argsort(-self.scores(question.question), kind="stable")[:k]
        return [self._rows[index] for index in best[::-1]]

    def over(self, rows: Sequence[Row]) -> "Bm25":
        """By BM25 over other rows."""
        return Bm25(rows)


def require_bm25() -> None:
    """Raises ConfigError, with the command that installs it, if the library of `Bm25` is absent."""
    if importlib.util.find_spec("bm25s") is None:
        raise ConfigError(
            "--choose=bm25 needs the library bm25s: pip install 'jaxft[compare]', or choose without it: --choose=fixed"
        )


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _index_of(words: Sequence[Sequence[str]]) -> Any:
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # its import sets it to DEBUG
    index = bm25s.BM25(method="lucene", dtype="float64")
    index.index(words, create_empty_token=False, show_progress=False)
    return index


class Own:
    """The k rows whose questions a model's own states say are most like the asked one, the most similar last.

    Similarity is the cosine of two vectors of `embed` less their mean over the rows, which all texts share.
    """

    name = "own"

    def __init__(self, rows: Sequence[Row], embed: Embed) -> None:
        self._rows, self._embed = list(rows), embed
        vectors_ND = embed([row.question for row in rows])
        self._mean_D = vectors_ND.mean(axis=0)
        self._units_ND = _units(vectors_ND - self._mean_D)

    def examples(self, question: Row, k: int) -> list[Row]:
        """The k most similar rows, the most similar last."""
        (unit_D,) = _units(self._embed([question.question]) - self._mean_D)
        best = np.argsort(-(self._units_ND @ unit_D), kind="stable")[:k]
        return [self._rows[index] for index in best[::-1]]

    def over(self, rows: Sequence[Row]) -> "Own":
        """By the same model over other rows."""
        return Own(rows, self._embed)


def _units(vectors_ND: np.ndarray) -> np.ndarray:
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.divide(vectors_ND, lengths_N1, out=np.zeros_like(vectors_ND), where=lengths_N1 > 0)


def choosers(names: Sequence[str], rows: Sequence[Row], seed: int, draws: int, embed: Embed) -> list[Chooser]:
    """The choosers of these names, `fixed` once for each draw, over rows. embed: for `own`."""
    out: list[Chooser] = []
    for name in names:
        if name == "own":
            out.append(Own(rows, embed))
        else:
            out += [Bm25(rows)] if name == "bm25" else [Fixed(rows, seed, draw) for draw in range(draws)]
    return out
