"""From a run's config to examined examples: one training set or several, and the held-out rows.

A training method with rows of its own reuses all of this: it passes `prepare_sets` a `ReadRow` that turns a row into
conversations, and pairs the examples up again by `Example.row`.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from jaxft.config import DataConfig, RunConfig
from jaxft.data.batch import Example
from jaxft.data.chat.arrange import names_of
from jaxft.data.chat.encode import prompt_of
from jaxft.data.encoded.encoding import encode_set
from jaxft.data.encoded.table import facts_of
from jaxft.data.encoded.table import join as join_sequences
from jaxft.data.examine import Examination, combine_examinations, count_repeated, examine
from jaxft.data.formats import Conversation, ReadRow, conversation_of, conversations
from jaxft.data.rows.bad_rows import BadRows
from jaxft.data.rows.columns import UnreadColumns
from jaxft.data.rows.refusals import check_rows
from jaxft.data.sources import Rows, held_out_rows, train_and_eval
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.data.truncation import ModelLimits
from jaxft.errors import DataError
from jaxft.nn.virtual import virtual_ids

ONLY = "train"  # name of the training set of a run without a mixture

# From the examples of a set, in the order of its conversations, and the names of rows in errors, by their indices, to
# the examples that are packed, such as the pairs of two.
Join = Callable[[Sequence[Example], Callable[[int], str]], list[Example]]


@dataclass(frozen=True, kw_only=True)
class RowSet:
    """Rows that are not read yet, and the settings to read them with. name: its name in the mixture."""

    name: str
    rows: Rows
    config: DataConfig


class Question(NamedTuple):
    """What is asked of a model by a held-out row: token ids, the right answer, and the row's name in errors."""

    prompt: list[int]
    reference: str
    name: str


@dataclass(frozen=True, kw_only=True)
class TrainSet:
    """One training set. name: its name in the mixture."""

    name: str
    examples: Sequence[Example]
    examination: Examination


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run's data, examined and ready to be made into batches.

    sets: in order of their names. examination: of all sets together. eval_examples and eval_examination are None if
    nothing is held out. eval_prompts and eval_references are the first `eval.limit` held-out prompts (token ids) and
    right answers (text), to score by generation, taken from the sets in turn; plain text has none. eval_names: of their
    rows, in errors. eval_sets: the held-out sets, of which eval_examples has the examples.
    """

    sets: tuple[TrainSet, ...]
    examination: Examination
    eval_examples: Sequence[Example] | None = None
    eval_prompts: list[list[int]] = field(default_factory=list)
    eval_references: list[str] = field(default_factory=list)
    eval_names: list[str] = field(default_factory=list)
    eval_sets: tuple[TrainSet, ...] = ()
    eval_examination: Examination | None = None

    @property
    def train_examples(self) -> Sequence[Example]:
        """The examples of all sets, one set after another."""
        return join_sequences([one.examples for one in self.sets])


def prepare(
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    read: ReadRow = conversation_of,
    join: Join | None = None,
    read_answers: ReadRow | None = None,
    no_answers: str = "the held-out rows are plain text",
    pairs: bool = False,
) -> Prepared:
    """Reads, tokenises and examines a run's training and held-out rows, each after the adapter's virtual tokens.

    read, join, pairs: see `prepare_set`. read_answers: the held-out conversations whose answers are the references of
    scores by generation; by default those of `read`. no_answers: why there may be none, for an error. Raises DataError,
    naming the row, for anything that would train silently wrong; also if eval.metric is set and the held-out rows have
    no answers to score.
    """
    train, held_out = open_sets(config)
    data = prepare_sets(train, held_out, config, tokenizer, read=read, join=join, pairs=pairs)
    kept = [set(facts_of(one.examples).rows.tolist()) for one in data.eval_sets]
    questions = _questions(held_out, kept, tokenizer, config.eval.limit, read_answers or read)
    if config.eval.metric and held_out and not questions:
        raise DataError(f"eval.metric compares answers with references, but {no_answers}")
    return dataclasses.replace(
        data,
        eval_prompts=[one.prompt for one in questions],
        eval_references=[one.reference for one in questions],
        eval_names=[one.name for one in questions],
    )


def open_sets(config: RunConfig) -> tuple[list[RowSet], list[RowSet]]:
    """(training sets in order of their names, held-out sets) of a run, opened and not yet read.

    `data.eval` is one held-out set for all training sets; `data.eval_fraction` splits one off each. Raises DataError
    if a set cannot be opened or the split leaves one side empty.
    """
    train, held_out = [], []
    for name, data in _set_configs(config.data).items():
        rows, eval_rows = train_and_eval(data, config.seed)
        train.append(RowSet(name=name, rows=rows, config=data))
        if eval_rows is not None:
            held_out.append(RowSet(name=name, rows=eval_rows, config=data))
    if config.data.mixture and (eval_rows := held_out_rows(config.data)) is not None:
        held_out = [RowSet(name=ONLY, rows=eval_rows, config=config.data)]
    return train, held_out


def prepare_sets(
    train: Sequence[RowSet],
    held_out: Sequence[RowSet],
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    read: ReadRow = conversation_of,
    join: Join | None = None,
    pairs: bool = False,
) -> Prepared:
    """The examples and examinations of opened sets, without eval_prompts and eval_references.

    read, join, pairs: see `prepare_set`, which also says what is raised.
    """
    first = virtual_ids(config.adapter.virtual_tokens)

    def prepare_one(one: RowSet) -> TrainSet:
        examples, examination = prepare_set(
            one.rows, one.config, tokenizer, first=first, read=read, join=join, pairs=pairs
        )
        return TrainSet(name=one.name, examples=examples, examination=examination)

    sets = [prepare_one(one) for one in train]
    trained = join_sequences([one.examples for one in sets])
    examination = combine_examinations([one.examination for one in sets], trained, "training sets")
    if not held_out:
        return Prepared(sets=tuple(sets), examination=examination)
    eval_sets = [prepare_one(one) for one in held_out]
    eval_examples = join_sequences([one.examples for one in eval_sets])
    eval_examination = combine_examinations([one.examination for one in eval_sets], eval_examples, "held-out sets")
    repeated = count_repeated(trained, eval_examples)
    if repeated:
        warning = f"{repeated:,} of {len(eval_examples):,} held-out examples are in the training set too"
        eval_examination = dataclasses.replace(eval_examination, warnings=(*eval_examination.warnings, warning))
    return Prepared(
        sets=tuple(sets),
        examination=examination,
        eval_examples=eval_examples,
        eval_sets=tuple(eval_sets),
        eval_examination=eval_examination,
    )


def prepare_set(
    rows: Rows,
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    first: Sequence[int] = (),
    read: ReadRow = conversation_of,
    join: Join | None = None,
    pairs: bool = False,
) -> tuple[Sequence[Example], Examination]:
    """One set: read, tokenised, and examined.

    config: how this set is read. first: token ids at the start of every example, which are not trained. read: turns
    the rows into conversations. join: makes examples that are packed as one, out of theirs, in the same order. pairs:
    whether they are pairs of a chosen and a rejected answer, which the examination then compares. Raises DataError,
    naming the row, as `read`, `join`, `encode_all` and `examine` do.
    """
    encoded, counts = encode_set(rows, config, tokenizer, read)
    check_rows(counts.bad, counts.unread, config, len(rows), rows.describe())
    examples: Sequence[Example] = encoded.prepend(first)
    try:
        examples = examples if join is None else join(examples, rows.where)
    except DataError as error:  # which knows the examples alone
        raise DataError(f"{rows.describe()}: {error}") from error
    return examine(
        examples,
        config,
        model=ModelLimits.of(tokenizer),
        where=rows.where,
        source=rows.describe(),
        counts=counts,
        pairs=pairs,
    )


def read_all(
    rows: Rows, config: DataConfig, tokenizer: Tokenizer, read: ReadRow = conversation_of
) -> list[Conversation]:
    """All conversations of rows that are few. Raises DataError for a row that cannot be read, and unread columns."""
    out = list(conversations(rows, config, read))
    unread = UnreadColumns(template_names=names_of(tokenizer))
    for conversation in out:
        unread.add(conversation.unread)
    check_rows(BadRows(), unread, config, len(rows), rows.describe())
    return out


def _set_configs(data: DataConfig) -> dict[str, DataConfig]:
    """How each training set is read, by name, in an order that does not depend on the config file's."""
    if not data.mixture:
        return {ONLY: data}
    return {name: dataclasses.replace(data.of_set(name), eval=None) for name in sorted(data.mixture)}


def _questions(
    held_out: Sequence[RowSet],
    kept: Sequence[Collection[int]],
    tokenizer: Tokenizer,
    limit: int | None,
    read: ReadRow,
) -> list[Question]:
    """What is asked of up to `limit` held-out rows, one set after another in turn; nothing for plain text.

    kept: of each set, the indices of the rows that are evaluated: those that were left out are not scored either.
    """

    def question_of(one: RowSet, conversation: Conversation) -> Question:
        return Question(*prompt_of(conversation, tokenizer, one.config), one.rows.where(conversation.row))

    def conversations_of(one: RowSet, rows: Collection[int]) -> Iterator[Conversation]:
        # What is wrong with rows that were left out has been told.
        read_rows = conversations(one.rows, one.config, read, on_bad=lambda row, where, error: None)
        return (conversation for conversation in read_rows if conversation.row in rows)

    read_sets = [conversations_of(one, rows) for one, rows in zip(held_out, kept, strict=True)]
    if len(held_out) == 1:  # of mixed rows, the questions among the first `limit`
        first = islice(read_sets[0], limit)
        return [question_of(held_out[0], row) for row in first if row.format != "text"]

    def questions_of(one: RowSet, read_set: Iterator[Conversation]) -> Iterator[Question]:
        for conversation in read_set:
            if conversation.format != "text":
                yield question_of(one, conversation)

    questions: list[Question] = []
    waiting = [questions_of(one, read_set) for one, read_set in zip(held_out, read_sets, strict=True)]
    while waiting and (limit is None or len(questions) < limit):
        round_of_each = [next(one, None) for one in waiting]
        waiting = [one for one, question in zip(waiting, round_of_each, strict=True) if question is not None]
        questions += [question for question in round_of_each if question is not None]
    return questions[:limit]
