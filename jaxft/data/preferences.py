"""Rows of preferences: a prompt with a chosen and a rejected answer, as messages or as text."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from jaxft.config import DataConfig, RunConfig
from jaxft.data.batch import Example
from jaxft.data.formats import Conversation, read_row
from jaxft.data.prepare import Prepared, prepare
from jaxft.data.sources import Rows
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError

ANSWERS = ("chosen", "rejected")


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

    def _document(self, number: int, tokens: slice) -> Example:
        return Example(
            tokens=self.tokens[tokens],
            mask=self.mask[tokens],
            row=self.row,
            values={name: (value[number],) for name, value in self.values.items()},
            arrays={name: array[tokens] for name, array in self.arrays.items()},
        )


def prepare_pairs(config: RunConfig, tokenizer: Tokenizer) -> Prepared:
    """A run's training and held-out pairs, read, tokenised and examined as `data.prepare` does it.

    A pair is one example, so that lengths, packing and truncation are those of both answers together. Only the answers
    are trained. eval_prompts and eval_references are prompts and chosen answers. Raises DataError, naming the row, if a
    row is no pair, if both answers are the same, and for all that `prepare` refuses.
    """
    return prepare(config, tokenizer, read=read_pairs, join=join_pairs, read_answers=chosen_answers)


def read_pairs(rows: Rows, config: DataConfig) -> Iterator[Conversation]:
    """Two conversations of every row: the prompt with the chosen answer, then with the rejected one.

    The prompt is in the field `data.prompt_field`; both it and the answers are text, or both are lists of messages.
    """
    for index in range(len(rows)):
        fields, where = rows[index], rows.where(index)
        missing = [name for name in (config.prompt_field, *ANSWERS) if fields.get(name) is None]
        if missing:
            raise DataError(
                f"{where} is no preference: it lacks {' and '.join(map(repr, missing))}. A row needs "
                f"{config.prompt_field!r}, 'chosen' and 'rejected' (its keys: {', '.join(sorted(fields)) or 'none'}). "
                "Set data.prompt_field to the name of your column of prompts."
            )
        if fields["chosen"] == fields["rejected"]:
            raise DataError(f"{where}: 'chosen' and 'rejected' are the same, so the row prefers nothing. Remove it.")
        for name in ANSWERS:
            # All turns of an answer are trained, and nothing else.
            one = replace(config, format="prompt_completion", completion_field=name)
            conversation = read_row(fields, one, row=index, where=f"{where}, {name}")
            yield replace(conversation, format="preference")


def chosen_answers(rows: Rows, config: DataConfig) -> Iterator[Conversation]:
    """The first conversation of every pair."""
    return islice(read_pairs(rows, config), 0, None, len(ANSWERS))


def join_pairs(examples: list[Example]) -> list[Example]:
    """The examples of `read_pairs`, two by two.

    Raises DataError if answers that differ as text are the same tokens, or if a template cuts an answer into several
    sequences.
    """
    pairs: list[Example] = []
    for chosen, rejected in zip(examples[::2], examples[1::2], strict=False):
        if chosen.row != rejected.row:
            raise DataError(
                f"an answer of row {chosen.row} was cut into several sequences, because the chat template rewrites its "
                "earlier turns. Give answers of one turn, or set data.chat_template to a template that does not."
            )
        tokens, mask = np.concatenate([chosen.tokens, rejected.tokens]), np.concatenate([chosen.mask, rejected.mask])
        values = {name: (*value, *rejected.values[name]) for name, value in chosen.values.items()}
        pairs.append(Pair(tokens=tokens, mask=mask, row=chosen.row, values=values, chosen_length=len(chosen)))
    return pairs
