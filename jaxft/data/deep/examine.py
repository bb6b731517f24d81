"""All deep checks of the rows of a config, and their findings by row."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxft.config import RunConfig
from jaxft.data.deep.balance import Balance, balances
from jaxft.data.deep.contradictions import Contradiction, contradictions
from jaxft.data.deep.duplicates import Duplicates, Leak, duplicates, leaks
from jaxft.data.deep.noise import Suspect
from jaxft.data.deep.shapes import Odd, odd_shapes
from jaxft.data.deep.similar import Compared, Near
from jaxft.data.deep.table import Table, read_table
from jaxft.data.deep.texts import READ, Texts
from jaxft.data.prepare import open_sets

# Why a row is left out of what `--write` writes, in the order in which reasons are looked for.
REASONS = ("unreadable", "empty", "leaks", "contradictions", "duplicates")


@dataclass(frozen=True, kw_only=True)
class DeepExamination:
    """What the deep checks found. Rows are indices into `texts`, training rows first.

    questions, whole: duplicates of last user messages, and of whole rows. odd: rows of an odd shape. suspects: rows
    whose answer may be wrong, the likeliest first; None if no model looked at them. problems: rows that cannot be read.
    """

    texts: Texts
    questions: Duplicates
    whole: Duplicates
    leaks: list[Leak]
    contradictions: list[Contradiction]
    odd: list[Odd]
    balances: list[Balance]
    problems: dict[int, str] = field(default_factory=dict)
    suspects: list[Suspect] | None = None

    def dropped(self, reasons: Sequence[str] = REASONS) -> dict[int, str]:
        """The training rows that cleaned rows do not have, each with the first of the reasons that holds for it.

        Of duplicates as whole rows the first row stays. Of a contradiction no row does, since nobody knows which one
        is right.
        """
        rows = {
            "unreadable": set(self.problems),
            "empty": {odd.row for odd in self.odd if odd.kind == "empty"},
            "leaks": {leak.train for leak in self.leaks},
            "contradictions": {row for one in self.contradictions for row in (one.first, one.second)},
            "duplicates": self.whole.rows,
        }
        return {
            row: reason
            for reason in reversed(REASONS)
            if reason in reasons
            for row in rows[reason]
            if row < self.texts.train
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the findings, each row with its set, its index there and its name."""
        train = self.texts.train
        dropped = self.dropped()
        return {
            "rows": {"train": train, "held_out": len(self.texts) - train},
            "duplicates": {
                "questions": self._duplicates(self.questions),
                "whole_rows": self._duplicates(self.whole),
            },
            "leaks": [
                {
                    "train": self._row(leak.train),
                    "held_out": self._row(leak.held_out),
                    "kind": leak.kind,
                    "similarity": leak.similarity,
                }
                for leak in self.leaks
            ],
            "contradictions": [self._pair(one) for one in self.contradictions],
            "odd": [{"kind": one.kind, "text": one.text, **self._row(one.row)} for one in self.odd],
            "balance": [dataclasses.asdict(one) for one in self.balances],
            "unreadable": [{**self._row(row), "text": text} for row, text in self.problems.items()],
            "noise": None if self.suspects is None else [self._suspect(one) for one in self.suspects],
            "drop": [{**self._row(row), "reason": dropped[row]} for row in sorted(dropped)],
        }

    def _duplicates(self, pairs: Duplicates) -> dict[str, Any]:
        rows = len(pairs.rows)
        return {
            "exact": [self._pair(pair) for pair in pairs.exact],
            "near": [self._pair(pair) for pair in pairs.near],
            "rows": rows,
            "share": rows / self.texts.train if self.texts.train else 0.0,
        }

    def _pair(self, pair: Near | Contradiction) -> dict[str, Any]:
        return {"first": self._row(pair.first), "second": self._row(pair.second), "similarity": pair.similarity}

    def _suspect(self, one: Suspect) -> dict[str, Any]:
        values = {name: value for name, value in dataclasses.asdict(one).items() if name != "row"}
        return self._row(one.row) | values

    def _row(self, index: int) -> dict[str, Any]:
        one, row = self.texts.locate(index)
        return {"set": one.name if index < self.texts.train else "held out", "row": row, "where": one.rows.where(row)}


def examine_deep(config: RunConfig) -> tuple[DeepExamination, Table]:
    """The findings in the rows of a config, without a model or a tokenizer, and the table that they were made from.

    Texts are read from their source when they are compared: memory holds some 100 bytes a row, the findings, and the
    n-grams of the held-out questions; signatures are in a temporary file. Raises ConfigError if no library for MinHash
    is installed, and DataError if a set cannot be opened.
    """
    texts = Texts(*open_sets(config), config)
    table = read_table(texts)
    by_question, by_whole = Compared(texts, table, "user"), Compared(texts, table, "whole")
    questions = duplicates(by_question, texts.train)

    def answer_of(row: int) -> str:
        return texts.known(row).answer or ""

    examination = DeepExamination(
        texts=texts,
        questions=questions,
        whole=duplicates(by_whole, texts.train),
        leaks=leaks(texts, table, [by_question, by_whole]),
        contradictions=contradictions(texts, table, by_question, questions.near),
        odd=odd_shapes(table, answer_of, metric_of(config)),
        balances=balances(_answers(texts, range(texts.train)), _answers(texts, range(texts.train, len(texts)))),
        problems=table.problems,
    )
    return examination, table


def metric_of(config: RunConfig) -> str | None:
    """The name of the metric by which answers are scored; None without one."""
    metric = config.eval.metric
    return None if metric is None else str(metric)


def _answers(texts: Texts, rows: range) -> Iterator[str]:
    for row in rows:
        try:
            text = texts[row]
        except READ:
            continue
        if text is not None and text.answer is not None:
            yield text.answer
