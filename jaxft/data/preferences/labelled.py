"""Rows with one answer and a label, good or bad, as messages or as text; and the mismatched documents of KTO."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jaxft.config import DataConfig, RunConfig
from jaxft.data.batch import Example
from jaxft.data.formats import DESIRABLE, EXTRAS, Conversation, read_row, texts_of
from jaxft.data.preferences.prompts import answer_to, messages_of, prompt_in
from jaxft.data.prepare import Prepared, prepare
from jaxft.data.rows.columns import split_ignored, unread_columns
from jaxft.data.rows.questions import with_system
from jaxft.data.rows.values import RowProblem
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError, did_you_mean

# What a label may be, written in small letters.
LABELS = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}
NONE_GOOD = (
    "no held-out row is labelled good, so that there are no right answers to compare generated ones with. Hold out "
    "rows with the label true, or set eval.metric=None"
)
# Answers that are tried for a prompt until one fits into a sequence with it.
TRIED = 64
# KTO, arXiv:2402.01306, on imbalanced data: desirable to undesirable rows, each times its weight, where it works best.
BALANCE = (1.0, 4.0 / 3.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reserved(Example):
    """A document for which a sequence keeps `room` tokens free, so that parallel batches have the same documents."""

    room: int

    def __len__(self) -> int:
        return self.room

    @property
    def documents(self) -> tuple[Example, ...]:
        """The document, with its own length."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Example)}
        return (Example(**own),)


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled(Reserved):
    """A labelled answer and its mismatched document, which stands in the same place in a batch of its own.

    room: tokens of the longer of the two. mismatched: the same prompt with the answer to another one.
    """

    mismatched: Example


def prepare_labelled(config: RunConfig, tokenizer: Tokenizer) -> Prepared:
    """A run's training and held-out rows with labels, read, tokenised and examined as `data.prepare` does it.

    Each is one document, whose `values` hold its label as DESIRABLE. If the loss of `method.kto` estimates a KL
    divergence, each has a mismatched document, drawn from `seed` within its set. eval_prompts and eval_references are
    those of desirable answers. Raises DataError, naming the row, for rows without a label and all that `prepare`
    refuses; if all labels are the same; and if all prompts of a set are, so that no document can be mismatched.
    """
    mismatched = config.method.kto.loss_type == "kto"
    join = partial(_one_each, seed=config.seed, max_length=config.data.max_length, mismatched=mismatched)
    data = prepare(
        config, tokenizer, read=read_labelled, join=join, read_answers=desirable_answers, no_answers=NONE_GOOD
    )
    desirable = int(sum(example.values[DESIRABLE][0] for example in data.train_examples))
    undesirable = len(data.train_examples) - desirable
    if not desirable or not undesirable:
        raise DataError(
            f"all {desirable or undesirable:,} training rows have the label {bool(desirable)}, so that nothing tells "
            f"good answers from bad ones. Add rows with the label {not desirable}, or train on good answers by "
            "method.name='sft'."
        )
    warning = _imbalance(config, desirable, undesirable)
    if warning is None:
        return data
    examination = dataclasses.replace(data.examination, warnings=(*data.examination.warnings, warning))
    return dataclasses.replace(data, examination=examination)


def read_labelled(
    fields: Mapping[str, Any], config: DataConfig, row: int, where: str, left_out: Counter[str]
) -> list[Conversation]:
    """A row as one conversation, of which one answer is trained, with its label in `values`.

    A row with a prompt and a completion is trained on the completion. Any other row of messages, in one of the formats
    of `read_row`, is trained on its last answer: the messages before it are the prompt, as they are if the completion
    is a whole conversation. Raises DataError, naming the row, for a row without a label or of none of these forms.
    """
    kept, ignored = split_ignored(fields, config)
    try:
        label = _label(kept, config)
        rest = {name: value for name, value in kept.items() if name != config.label_field}
        given, one, columns = _with_prompt(rest, config)
    except RowProblem as problem:
        raise DataError(f"{where}: {problem}") from problem
    conversation = read_row(given, one, row=row, where=where)
    if conversation.format != "prompt_completion":
        last = max(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
        conversation = dataclasses.replace(conversation, first_trained=last)
    unread = (*ignored, *conversation.unread, *unread_columns(rest, {*columns, *given}, config, texts_of(conversation)))
    return [dataclasses.replace(conversation, format="labelled", values={DESIRABLE: label}, unread=unread)]


def _with_prompt(fields: Mapping[str, Any], config: DataConfig) -> tuple[dict[str, Any], DataConfig, set[str]]:
    """The fields of a row for `read_row`, how it is to read them, and the columns that were read to make them."""
    completion = fields.get(config.completion_field)
    if config.format not in ("auto", "prompt_completion") or completion is None:
        if config.format == "text" or fields.get(config.text_field) is not None:
            raise RowProblem(
                f"it is plain text, which has no prompt. A labelled row needs {config.prompt_field!r}, "
                f"{config.completion_field!r} and {config.label_field!r}, or messages and {config.label_field!r}."
            )
        return dict(fields), config, set()
    extras = {name: fields[name] for name in EXTRAS if fields.get(name) is not None}
    answer, prompt = messages_of(completion, config.completion_field), prompt_in(fields, config)
    if prompt.given is not None:
        answer = answer_to(prompt.given, answer)
        row = {**extras, config.prompt_field: prompt.given, config.completion_field: answer}
        return row, dataclasses.replace(config, format="prompt_completion"), set(prompt.columns)
    if isinstance(answer, str):
        raise RowProblem(
            f"it has no prompt: there is no {config.prompt_field!r}, and {config.completion_field!r} is text. Set "
            f"data.prompt_field to the column of prompts (its keys: {', '.join(sorted(fields))})."
        )
    whole, columns = with_system(fields, answer, config)
    own = dataclasses.replace(config, format="messages", messages_field="messages")
    return {**extras, "messages": whole}, own, {config.completion_field, *columns}


def desirable_answers(
    fields: Mapping[str, Any], config: DataConfig, row: int, where: str, left_out: Counter[str]
) -> list[Conversation]:
    """The conversation of a row that is labelled good; none for another."""
    return [one for one in read_labelled(fields, config, row, where, left_out) if one.values[DESIRABLE]]


def mismatch(examples: Sequence[Example], seed: int, max_length: int) -> list[Labelled]:
    """The examples, each with a document of its prompt and the answer to another prompt.

    The examples are put into an order drawn from `seed`. The answer is that of the next one in this order, after the
    last the first, whose prompt differs and whose answer fits into max_length with the prompt; if none of the next 64
    fits, the next whose prompt differs. So every answer is used about once, and the choice depends on no batch.
    Raises DataError if all prompts are the same.
    """
    starts = [int(np.argmax(example.mask)) for example in examples]
    prompts = [example.tokens[:start].tobytes() for example, start in zip(examples, starts, strict=True)]
    if len(set(prompts)) < 2:
        raise DataError(
            f"all {len(examples):,} rows have the same prompt, but KTO estimates a KL divergence from answers to other "
            "prompts. Add rows with other prompts, or set method.kto.loss_type='apo_zero_unpaired', which needs no "
            "estimate."
        )
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    others = _next_other([prompts[index] for index in order])
    out: dict[int, Labelled] = {}
    for position, index in enumerate(order):
        start, first = starts[index], others[position]
        candidates = (order[(first + step) % len(order)] for step in range(TRIED))
        fitting = (
            other
            for other in candidates
            if prompts[other] != prompts[index] and start + _answer_length(examples[other], starts[other]) <= max_length
        )
        other = next(fitting, order[first])
        out[index] = _labelled(examples[index], start, examples[other], starts[other])
    return [out[index] for index in range(len(examples))]


def _next_other(prompts: Sequence[bytes]) -> list[int]:
    """For every position of a circle, the next position with another prompt."""
    count = len(prompts)
    out, following = [0] * count, 0
    for step in reversed(range(2 * count)):  # twice around, so that the end knows the beginning
        position, after = step % count, (step + 1) % count
        if prompts[position] != prompts[after]:
            following = after
        out[position] = following
    return out


def _answer_length(example: Example, start: int) -> int:
    return len(example.tokens) - start


def _labelled(example: Example, start: int, other: Example, other_start: int) -> Labelled:
    tokens = np.concatenate([example.tokens[:start], other.tokens[other_start:]])
    mask = np.concatenate([example.mask[:start], other.mask[other_start:]])
    own = {field.name: getattr(example, field.name) for field in dataclasses.fields(Example)}
    mismatched = Example(tokens=tokens, mask=mask, row=example.row)
    return Labelled(**own, room=max(len(example.tokens), len(tokens)), mismatched=mismatched)


def _one_each(
    examples: Sequence[Example], where: Callable[[int], str], *, seed: int, max_length: int, mismatched: bool
) -> list[Example]:
    """`Join` of labelled rows. Raises DataError for an answer that is cut into several sequences, and as `mismatch`."""
    rows = [example.row for example in examples]
    for before, row in itertools.pairwise(rows):
        if before == row:
            raise DataError(
                f"the answer of {where(row)} was cut into several sequences, because the chat template rewrites its "
                "earlier turns. Give answers of one turn, or set data.chat_template to a template that does not."
            )
    trained = all(example.mask.any() for example in examples)  # rows without are refused by the examination, by name
    return list(mismatch(examples, seed, max_length)) if mismatched and examples and trained else list(examples)


def _label(fields: Mapping[str, Any], config: DataConfig) -> float:
    name = config.label_field
    if fields.get(name) is None:
        raise RowProblem(
            f"it has no {name!r}, which says whether its answer is good (true) or bad (false). Set data.label_field to "
            f"the column of labels (its keys: {', '.join(sorted(fields)) or 'none'}).{did_you_mean(name, fields)}"
        )
    label = LABELS.get(str(fields[name]).lower())
    if label is None:
        raise RowProblem(f"{name!r} is {str(fields[name])[:60]!r}; it may be true or false, or 1 or 0")
    return label


def _imbalance(config: RunConfig, desirable: int, undesirable: int) -> str | None:
    """What is wrong with the balance of labels and weights; None if nothing is."""
    settings, (low, high) = config.method.kto, BALANCE
    ratio = settings.desirable_weight * desirable / (settings.undesirable_weight * undesirable)
    if low - 1e-9 <= ratio <= high + 1e-9:
        return None
    good = settings.undesirable_weight * undesirable / desirable
    bad = settings.desirable_weight * desirable / undesirable
    return (
        f"{desirable:,} desirable and {undesirable:,} undesirable answers, each with its weight, are as {ratio:.2f} to "
        f"1, but KTO works best between 1 to 1 and 4 to 3. Set method.kto.desirable_weight to between {good * low:.2f} "
        f"and {good * high:.2f}, or method.kto.undesirable_weight to between {bad / high:.2f} and {bad / low:.2f}."
    )
