"""From rows of text to token sequences: sources, formats, chat, examine, packing, loader."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from jaxft.config import DataConfig, RunConfig
from jaxft.data.batch import Batch, Example
from jaxft.data.chat import encode_all, prompt_of
from jaxft.data.examine import Examination, examine, print_examination, render_rows, repeated
from jaxft.data.formats import Conversation, conversations
from jaxft.data.sources import Rows, train_and_eval
from jaxft.data.tokenizer import Tokenizer, load_tokenizer
from jaxft.nn.virtual import virtual_ids

__all__ = [
    "Batch",
    "Conversation",
    "Examination",
    "Example",
    "Prepared",
    "Tokenizer",
    "load_tokenizer",
    "prepare",
    "print_examination",
    "render_rows",
]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run's data, examined and ready for `loader.Loader`.

    eval_examples and eval_examination are None where nothing is held out. eval_prompts and
    eval_references are the first `eval.limit` held-out prompts (token ids) and right answers
    (text), to score by generation; none for plain text, which asks nothing.
    """

    train_examples: list[Example]
    eval_examples: list[Example] | None
    eval_prompts: list[list[int]]
    eval_references: list[str]
    examination: Examination
    eval_examination: Examination | None


def prepare(config: RunConfig, tokenizer: Tokenizer) -> Prepared:
    """Read, tokenise and examine a run's training and held-out rows, each behind the adapter's virtual tokens.

    Raises DataError, with the row, for anything that would train silently wrong.
    """
    train, held_out = train_and_eval(config.data, config.seed)
    first = virtual_ids(config.adapter.virtual_tokens)
    train_examples, examination = _prepare_set(train, config.data, tokenizer, first)
    if held_out is None:
        return Prepared(
            train_examples=train_examples,
            eval_examples=None,
            eval_prompts=[],
            eval_references=[],
            examination=examination,
            eval_examination=None,
        )
    eval_examples, eval_examination = _prepare_set(held_out, config.data, tokenizer, first)
    both = repeated(train_examples, eval_examples)
    if both:
        warning = f"{both:,} of {len(eval_examples):,} held-out examples are in the training set too"
        eval_examination = replace(eval_examination, warnings=(*eval_examination.warnings, warning))
    scored = islice(conversations(held_out, config.data), config.eval.limit)
    asked = [prompt_of(conversation, tokenizer) for conversation in scored if conversation.format != "text"]
    return Prepared(
        train_examples=train_examples,
        eval_examples=eval_examples,
        eval_prompts=[prompt for prompt, _ in asked],
        eval_references=[reference for _, reference in asked],
        examination=examination,
        eval_examination=eval_examination,
    )


def _prepare_set(
    rows: Rows, config: DataConfig, tokenizer: Tokenizer, first: Sequence[int]
) -> tuple[list[Example], Examination]:
    formats: Counter[str] = Counter()

    def counted() -> Iterator[Conversation]:
        for conversation in conversations(rows, config):
            formats[conversation.format] += 1
            yield conversation

    return examine(
        [example.behind(first) for example in encode_all(counted(), tokenizer, config.train_on)],
        config,
        stop_ids=tokenizer.stop_ids,
        where=rows.where,
        source=rows.describe(),
        formats=formats,
    )
