"""From rows of preferences to pairs: two documents that share a sequence."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from jaxft.config import DataConfig, RunConfig
from jaxft.data.batch import Example
from jaxft.data.examine_pairs import MARGIN
from jaxft.data.formats import Conversation, RowProblem, read_row
from jaxft.data.preferences.rows import Preference, preferences_of
from jaxft.data.prepare import Prepared, prepare
from jaxft.data.sources import Rows
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair(Example):
    """Two documents that share a sequence, one after the other: prompt + chosen answer, prompt + rejected answer.

    tokens, mask: of both. chosen_length: tokens of the first.
    """

    chosen_length: int

    @property
    def documents(self) -> tuple[Example, ...]:
        """The chosen and the rejected document."""
        return self._document(0, slice(self.chosen_length)), self._document(1, slice(self.chosen_length, None))

    @property
    def names(self) -> tuple[str, ...]:
        """`chosen` and `rejected`."""
        return SIDES

    def _document(self, number: int, tokens: slice) -> Example:
        return Example(
            tokens=self.tokens[tokens],
            mask=self.mask[tokens],
            row=self.row,
            part=self.part + number,
            values={name: (value[number],) for name, value in self.values.items()},
            arrays={name: array[tokens] for name, array in self.arrays.items()},
        )


def prepare_pairs(config: RunConfig, tokenizer: Tokenizer) -> Prepared:
    """A run's training and held-out pairs, read, tokenised and examined as `data.prepare` does it.

    A pair is one example, so that lengths, packing and truncation are those of both answers together. Only the answers
    are trained. Both documents carry the pair's `margin`, 0 if the rows have none. eval_prompts and eval_references
    are prompts and chosen answers. Raises DataError, naming the row, if a row is no pair, if both answers are the same,
    and for all that `prepare` refuses.
    """
    return prepare(config, tokenizer, read=read_pairs, join=join_pairs, read_answers=chosen_answers, pairs=True)


def read_pairs(rows: Rows, config: DataConfig, left_out: Counter[str]) -> Iterator[Conversation]:
    """Two conversations of every pair: the prompt with the chosen answer, then with the rejected one.

    A row has one pair, or several if it has a list of ranked answers; see `preferences_of`. left_out: takes the rows
    without a pair, and the pairs of ranked answers that are `ties` or the `same`. Raises DataError, naming the row, if
    a row is no preference, if its two answers are the same, and if only some rows have a margin.
    """
    first_margin: tuple[int, bool] | None = None
    for index in range(len(rows)):
        where = rows.where(index)
        try:
            preferences = preferences_of(rows[index], config, left_out)
        except RowProblem as problem:
            raise DataError(f"{where}: {problem}") from problem
        if not preferences:
            left_out["rows"] += 1
            continue
        has_margin = preferences[0].margin is not None
        if first_margin is None:
            first_margin = index, has_margin
        elif first_margin[1] is not has_margin:
            with_one, without = (index, first_margin[0]) if has_margin else (first_margin[0], index)
            raise DataError(
                f"{rows.where(with_one)} has a margin, or scores of both answers, and {rows.where(without)} has none. "
                "Give all rows one, or none."
            )
        for number, preference in enumerate(preferences):
            yield from _conversations(preference, config, row=index, number=number, where=where)


def _conversations(
    preference: Preference, config: DataConfig, *, row: int, number: int, where: str
) -> Iterator[Conversation]:
    if preference.chosen == preference.rejected:
        chosen, rejected = preference.names
        raise DataError(f"{where}: {chosen!r} and {rejected!r} are the same, so the row prefers nothing. Remove it.")
    margin = 0.0 if preference.margin is None else preference.margin
    for side, name in enumerate(preference.names):
        # All turns of an answer are trained, and nothing else.
        one = replace(config, format="prompt_completion", completion_field=name)
        answer = preference.chosen if side == 0 else preference.rejected
        fields = {**preference.extras, config.prompt_field: preference.prompt, name: answer}
        conversation = read_row(fields, one, row=row, where=f"{where}, {name}")
        yield replace(conversation, format=preference.form, part=2 * number + side, values={MARGIN: margin})


def chosen_answers(rows: Rows, config: DataConfig, left_out: Counter[str]) -> Iterator[Conversation]:
    """The first conversation of every row: its prompt with the chosen answer, the best one of a list."""
    for _, of_row in itertools.groupby(read_pairs(rows, config, left_out), lambda conversation: conversation.row):
        yield from islice(of_row, 1)


def join_pairs(examples: list[Example]) -> list[Example]:
    """The examples of `read_pairs`, two by two.

    Raises DataError if a template cuts an answer into several sequences.
    """
    pairs: list[Example] = []
    for _, of_pair in itertools.groupby(examples, lambda example: (example.row, example.part // 2)):
        sides = list(of_pair)
        if len(sides) != 2:
            raise DataError(
                f"an answer of row {sides[0].row} was cut into several sequences, because the chat template rewrites "
                "its earlier turns. Give answers of one turn, or set data.chat_template to a template that does not."
            )
        chosen, rejected = sides
        tokens, mask = np.concatenate([chosen.tokens, rejected.tokens]), np.concatenate([chosen.mask, rejected.mask])
        values = {name: (*value, *rejected.values[name]) for name, value in chosen.values.items()}
        pairs.append(
            Pair(
                tokens=tokens, mask=mask, row=chosen.row, part=chosen.part, values=values, chosen_length=len(chosen)
            )
        )  # fmt: skip
    return pairs
