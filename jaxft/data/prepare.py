"""From a run's config to examined examples: one training set or several, and what is held out."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from jaxft.config import DataConfig, RunConfig
from jaxft.data.batch import Example
from jaxft.data.chat.encode import encode_all, prompt_of
from jaxft.data.chat.reasoning import thoughts_of
from jaxft.data.examine import Examination, examine, repeated, together
from jaxft.data.formats import Conversation, conversations
from jaxft.data.sources import Rows, held_out_rows, train_and_eval
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.nn.virtual import virtual_ids

ONLY = "train"  # what the one set of a run without a mixture is called


@dataclass(frozen=True, kw_only=True)
class TrainSet:
    """One training set. name: its name in the mixture."""

    name: str
    examples: list[Example]
    examination: Examination


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run's data, examined and ready to be made into batches.

    sets: by name. examination: of all of them together. eval_examples and eval_examination are None where nothing
    is held out. eval_prompts and eval_references are the first `eval.limit` held-out prompts (token ids) and right
    answers (text), to score by generation, in turn from each set; none for plain text, which asks nothing.
    """

    sets: tuple[TrainSet, ...]
    examination: Examination
    eval_examples: list[Example] | None
    eval_prompts: list[list[int]]
    eval_references: list[str]
    eval_examination: Examination | None

    @property
    def train_examples(self) -> list[Example]:
        """The examples of all sets, one set after another."""
        return [example for one in self.sets for example in one.examples]


def prepare(config: RunConfig, tokenizer: Tokenizer) -> Prepared:
    """Read, tokenise and examine a run's training and held-out rows, each behind the adapter's virtual tokens.

    Raises DataError, with the row, for anything that would train silently wrong.
    """
    sets, held_out = [], []
    first = virtual_ids(config.adapter.virtual_tokens)
    for name, data in _sets(config.data).items():
        rows, apart = train_and_eval(data, config.seed)
        examples, found = _prepare_set(rows, data, tokenizer, first)
        sets.append(TrainSet(name=name, examples=examples, examination=found))
        held_out += [(apart, data)] if apart is not None else []
    if config.data.mixture and config.data.eval is not None:
        held_out = [(held_out_rows(config.data), config.data)]
    trained = [example for one in sets for example in one.examples]
    examination = together([one.examination for one in sets], trained, "training sets")
    if not held_out:
        nothing = {"eval_examples": None, "eval_prompts": [], "eval_references": [], "eval_examination": None}
        return Prepared(sets=tuple(sets), examination=examination, **nothing)
    parts = [_prepare_set(rows, data, tokenizer, first) for rows, data in held_out]
    eval_examples = [example for examples, _ in parts for example in examples]
    eval_examination = together([found for _, found in parts], eval_examples, "held-out sets")
    both = repeated(trained, eval_examples)
    if both:
        warning = f"{both:,} of {len(eval_examples):,} held-out examples are in the training set too"
        eval_examination = dataclasses.replace(eval_examination, warnings=(*eval_examination.warnings, warning))
    asked = _asked(held_out, tokenizer, config.eval.limit)
    return Prepared(
        sets=tuple(sets),
        examination=examination,
        eval_examples=eval_examples,
        eval_prompts=[prompt for prompt, _ in asked],
        eval_references=[reference for _, reference in asked],
        eval_examination=eval_examination,
    )


def _sets(data: DataConfig) -> dict[str, DataConfig]:
    """How each training set is read, by name, in an order that does not depend on the config file's."""
    if not data.mixture:
        return {ONLY: data}
    return {name: dataclasses.replace(data.of_set(name), eval=None) for name in sorted(data.mixture)}


def _asked(
    held_out: Sequence[tuple[Rows, DataConfig]], tokenizer: Tokenizer, limit: int | None
) -> list[tuple[list[int], str]]:
    def of_one(rows: Rows, data: DataConfig) -> Iterator[tuple[list[int], str]]:
        for conversation in conversations(rows, data):
            if conversation.format != "text":
                yield prompt_of(conversation, tokenizer, data)

    if len(held_out) == 1:  # of mixed rows, those among the first that ask
        rows, data = held_out[0]
        first = islice(conversations(rows, data), limit)
        return [prompt_of(one, tokenizer, data) for one in first if one.format != "text"]
    waiting, asked = [of_one(rows, data) for rows, data in held_out], []
    while waiting and (limit is None or len(asked) < limit):
        found = [next(one, None) for one in waiting]
        waiting = [one for one, answer in zip(waiting, found, strict=True) if answer is not None]
        asked += [answer for answer in found if answer is not None]
    return asked[:limit]


def _prepare_set(
    rows: Rows, config: DataConfig, tokenizer: Tokenizer, first: Sequence[int]
) -> tuple[list[Example], Examination]:
    formats: Counter[str] = Counter()
    holds: Counter[str] = Counter()
    notes: Counter[str] = Counter()

    def counted() -> Iterator[Conversation]:
        for conversation in conversations(rows, config):
            formats[conversation.format] += 1
            holds.update(_parts(conversation))
            yield conversation

    return examine(
        [example.behind(first) for example in encode_all(counted(), tokenizer, config, notes)],
        config,
        stop_ids=tokenizer.stop_ids,
        where=rows.where,
        source=rows.describe(),
        formats=formats,
        holds=holds,
        notes=notes,
    )


def _parts(conversation: Conversation) -> list[str]:
    """What a row has beside a question and an answer."""
    messages = conversation.messages
    answers = [message for message in messages if message["role"] == "assistant"]
    there = {
        "a system message": any(message["role"] in ("system", "developer") for message in messages),
        "several answers": len(answers) > 1,
        "tools": bool(conversation.tools),
        "tool calls": any(message.get("tool_calls") for message in answers),
        "thoughts": any(thoughts_of(message) for message in answers),
        "answers not to be trained": bool(conversation.untrained),
    }
    return [name for name, found in there.items() if found]
