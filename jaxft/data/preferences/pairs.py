"""From rows of preferences to pairs: two documents that share a sequence."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxft.config import DataConfig, RunConfig
from jaxft.data.batch import Example
from jaxft.data.examine_pairs import MARGIN
from jaxft.data.formats import Conversation, read_row, texts_of
from jaxft.data.preferences.rows import Preference, preferences_of
from jaxft.data.prepare import Prepared, prepare
from jaxft.data.rows.columns import Form, Unread, split_ignored, unread_columns
from jaxft.data.rows.values import RowProblem
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


def read_pairs(
    fields: Mapping[str, Any], config: DataConfig, row: int, where: str, left_out: Counter[str]
) -> list[Conversation]:
    """Two conversations of every pair of a row: the prompt with the chosen answer, then with the rejected one.

    A row has one pair, or several if it has a list of ranked answers; see `preferences_of`. Only pairs with a margin
    have one in `values`. left_out: takes the rows without a pair, and the pairs of ranked answers that are `ties` or
    the `same`. Raises DataError, naming the row, if it is no preference, and if its two answers are the same.
    """
    kept, ignored = split_ignored(fields, config)
    try:
        preferences = preferences_of(kept, config, left_out)
    except RowProblem as problem:
        raise DataError(f"{where}: {problem}") from problem
    if not preferences:
        left_out["rows"] += 1
    return [
        conversation
        for number, preference in enumerate(preferences)
        for conversation in _conversations(preference, kept, ignored, config, row=row, number=number, where=where)
    ]


def _conversations(
    preference: Preference,
    fields: Mapping[str, Any],
    ignored: Sequence[Unread],
    config: DataConfig,
    *,
    row: int,
    number: int,
    where: str,
) -> list[Conversation]:
    if preference.chosen == preference.rejected:
        chosen, rejected = preference.names
        raise DataError(f"{where}: {chosen!r} and {rejected!r} are the same, so the row prefers nothing. Remove it.")
    values = {} if preference.margin is None else {MARGIN: preference.margin}
    out = []
    for side, name in enumerate(preference.names):
        # All turns of an answer are trained, and nothing else.
        one = replace(config, format="prompt_completion", completion_field=name)
        answer = preference.chosen if side == 0 else preference.rejected
        given = {**preference.extras, config.prompt_field: preference.prompt, name: answer}
        conversation = read_row(given, one, row=row, where=f"{where}, {name}")
        out.append(replace(conversation, format=preference.form, part=2 * number + side, values=values))
    texts = [text for conversation in out for text in texts_of(conversation)]
    form: Form | None = None if isinstance(preference.prompt, str) else "chat"
    unread = [
        *ignored,
        *out[0].unread,
        *out[1].unread,
        *unread_columns(fields, preference.columns, config, texts, form=form),
    ]
    return [replace(conversation, unread=tuple(unread)) for conversation in out]


def chosen_answers(
    fields: Mapping[str, Any], config: DataConfig, row: int, where: str, left_out: Counter[str]
) -> list[Conversation]:
    """The first conversation of a row: its prompt with the chosen answer, the best one of a list."""
    return read_pairs(fields, config, row, where, left_out)[:1]


def join_pairs(examples: Sequence[Example], where: Callable[[int], str]) -> list[Example]:
    """The examples of `read_pairs`, two by two. where: the name of a row in errors, from its index.

    All of them carry a margin, 0 if none has one. Raises DataError if only some have one, and if a template cuts an
    answer into several sequences.
    """
    _refuse_some_margins(examples, where)
    pairs: list[Example] = []
    for _, of_pair in itertools.groupby(examples, lambda example: (example.row, example.part // 2)):
        sides = list(of_pair)
        if len(sides) != 2:
            raise DataError(
                f"an answer of {where(sides[0].row)} was cut into several sequences, because the chat template "
                "rewrites its earlier turns. Give answers of one turn, or set data.chat_template to a template that "
                "does not."
            )
        chosen, rejected = sides
        tokens, mask = np.concatenate([chosen.tokens, rejected.tokens]), np.concatenate([chosen.mask, rejected.mask])
        margin = _margin_of(chosen)
        pairs.append(
            Pair(
                tokens=tokens,
                mask=mask,
                row=chosen.row,
                part=chosen.part,
                values={MARGIN: (0.0, 0.0) if margin is None else (margin, margin)},
                chosen_length=len(chosen),
            )
        )
    return pairs


def _margin_of(example: Example) -> float | None:
    (margin,) = example.values.get(MARGIN, (math.nan,))
    return None if math.isnan(margin) else margin


def _refuse_some_margins(examples: Sequence[Example], where: Callable[[int], str]) -> None:
    first: dict[bool, int] = {}
    for example in examples:
        first.setdefault(_margin_of(example) is not None, example.row)
    if len(first) == 2:
        raise DataError(
            f"{where(first[True])} has a margin, or scores of both answers, and {where(first[False])} has none. Give "
            "all rows one, or none."
        )
