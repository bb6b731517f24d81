"""Rows of prompts: the model answers them while it trains, and rewards judge its answers."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxft.config import DataConfig, RunConfig
from jaxft.data.batch import Example
from jaxft.data.chat.encode import bos_of
from jaxft.data.chat.reasoning import split_thoughts
from jaxft.data.chat.tool_calls import BadCall, tools_of
from jaxft.data.chat.turns import render
from jaxft.data.examine import Examination, combine_examinations, count_repeated, histogram
from jaxft.data.examine_pairs import length_quantiles
from jaxft.data.formats import Conversation, RowProblem, check_messages, template_kwargs_of
from jaxft.data.preferences.prompts import Message, messages_of, prompt_in
from jaxft.data.prepare import Prepared, RowSet, TrainSet, open_sets
from jaxft.data.sources import Rows
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError, listed
from jaxft.nn.virtual import virtual_ids

NAMED = 10  # rows named in one error
# The column under which reward functions find the answer of a row, whatever its column is called.
REFERENCE = "reference"
# Columns that are the prompt if there is no `data.prompt_field`, and then not given to reward functions.
PROMPT_COLUMNS = ("messages", "conversations", "instruction", "input", "system", "history")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt(Example):
    """The tokens of a prompt, none of which is trained.

    messages: the prompt as reward functions see it, text or messages. tools, template_kwargs: what its rendering reads
    beside the messages. columns: the other columns of its row, and its answer as REFERENCE if it has one. where: the
    name of the row in errors.
    """

    messages: str | tuple[Message, ...]
    where: str
    tools: tuple[dict[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> str | None:
        """The answer that its row gives; None if it has none that is text."""
        value = self.columns.get(REFERENCE)
        return value if isinstance(value, str) else None


def prepare_prompts(config: RunConfig, tokenizer: Tokenizer) -> Prepared:
    """A run's training and held-out prompts, read, tokenised and examined; the examples are `Prompt`s.

    Each has at most `data.max_length` tokens together with `rollout.max_completion_length`. eval_prompts are the first
    `eval.limit` held-out prompts; eval_references their answers, if all of them have one. Raises DataError, naming the
    row, for rows without a prompt and prompts that are too long.
    """
    train, held_out = open_sets(config)
    sets = [_prepare_set(one, config, tokenizer) for one in train]
    prompts = [prompt for one in sets for prompt in one.examples]
    examination = combine_examinations([one.examination for one in sets], prompts, "training sets")
    if not held_out:
        return Prepared(sets=tuple(sets), examination=examination)
    eval_sets = [_prepare_set(one, config, tokenizer) for one in held_out]
    eval_prompts = [prompt for one in eval_sets for prompt in one.examples]
    eval_examination = combine_examinations([one.examination for one in eval_sets], eval_prompts, "held-out sets")
    if repeated := count_repeated(prompts, eval_prompts):
        warning = f"{repeated:,} of {len(eval_prompts):,} held-out prompts are in the training set too"
        eval_examination = dataclasses.replace(eval_examination, warnings=(*eval_examination.warnings, warning))
    questions = eval_prompts[: config.eval.limit]
    references = [prompt.reference for prompt in questions if isinstance(prompt, Prompt)]
    if config.eval.metric and None in references:
        raise DataError(
            f"eval.metric={config.eval.metric!r} compares answers with references, but {references.count(None)} of "
            f"the {len(questions)} held-out prompts have none. Give their rows an answer, or set eval.metric to None: "
            "the rewards score held-out answers too."
        )
    return Prepared(
        sets=tuple(sets),
        examination=examination,
        eval_examples=eval_prompts,
        eval_prompts=[prompt.tokens.tolist() for prompt in questions],
        eval_references=[reference for reference in references if reference is not None],
        eval_examination=eval_examination,
    )


def read_prompts(rows: Rows, config: DataConfig, tokenizer: Tokenizer, first: Sequence[int] = ()) -> Iterator[Prompt]:
    """The prompt of every row, in order. first: token ids at the start of each, such as those of virtual tokens.

    The prompt is in `data.prompt_field`, or where preferences have it, as text or messages; or it is the messages of a
    conversation before its last answer, which is then the row's REFERENCE. So are the columns `data.completion_field`
    and `output`. Raises DataError, naming the row, if it has no prompt.
    """
    for index in range(len(rows)):
        fields = {name: value for name, value in rows[index].items() if value is not None}
        where = rows.where(index)
        try:
            yield _prompt(fields, config, tokenizer, row=index, where=where, first=first)
        except (RowProblem, BadCall) as problem:
            raise DataError(f"{where}: {problem}") from problem


def _prompt(
    fields: Mapping[str, Any],
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    row: int,
    where: str,
    first: Sequence[int],
) -> Prompt:
    given, answer = _prompt_and_answer(fields, config)
    used = (config.prompt_field,) if config.prompt_field in fields else PROMPT_COLUMNS
    columns = {name: value for name, value in fields.items() if name not in used}
    if answer is not None:
        columns.setdefault(REFERENCE, answer)
    if isinstance(given, str):
        if not given:
            raise RowProblem("its prompt is empty")
        ids = [*bos_of(tokenizer), *tokenizer.encode(given)]
        tokenizer.check_rows(ids, where)
        return _with_tokens(ids, first, row, where, given, columns=columns)
    messages = check_messages(given, config.prompt_field, answer=False)
    if messages[-1]["role"] == "assistant":
        raise RowProblem("its prompt ends in an answer, so that there is nothing to answer: remove the last message")
    tools, kwargs = tools_of(fields), template_kwargs_of(fields)
    chat = Conversation(row=row, where=where, format="prompt", messages=messages, tools=tools, template_kwargs=kwargs)
    ids = tokenizer.encode(render(chat, tokenizer, len(messages), add_generation_prompt=True))
    tokenizer.check_rows(ids, where)
    return _with_tokens(ids, first, row, where, messages, columns=columns, tools=tools, template_kwargs=kwargs)


def _with_tokens(
    ids: Sequence[int], first: Sequence[int], row: int, where: str, messages: str | tuple[Message, ...], **more: Any
) -> Prompt:
    tokens = np.array([*first, *ids], np.int32)
    return Prompt(tokens=tokens, mask=np.zeros(len(tokens), np.uint8), row=row, where=where, messages=messages, **more)


def _prompt_and_answer(fields: Mapping[str, Any], config: DataConfig) -> tuple[str | list[Message], str | None]:
    """The prompt of a row, and the answer that it gives, if any."""
    given = fields.get("messages") if fields.get(config.prompt_field) is None else None
    conversation = given is not None or (fields.get(config.prompt_field) is None and "conversations" in fields)
    prompt = messages_of(given, "messages") if given is not None else prompt_in(fields, config)
    if prompt is None:
        raise RowProblem(
            f"it has no prompt. A row needs {config.prompt_field!r}, or messages. Set data.prompt_field to the column "
            f"of prompts (its keys: {', '.join(sorted(fields)) or 'none'})."
        )
    if conversation and not isinstance(prompt, str):
        answers = [number for number, message in enumerate(prompt) if message.get("role") == "assistant"]
        if answers and answers[-1] == len(prompt) - 1:
            content = prompt[-1].get("content")
            return prompt[:-1], split_thoughts(content)[1] if isinstance(content, str) else None
        return prompt, None
    answer = fields.get(config.completion_field, fields.get("output"))
    if isinstance(answer, list) and answer and isinstance(answer[-1], Mapping):
        answer = answer[-1].get("content")
    return prompt, answer if isinstance(answer, str) else None


def _prepare_set(one: RowSet, config: RunConfig, tokenizer: Tokenizer) -> TrainSet:
    first = virtual_ids(config.adapter.virtual_tokens)
    prompts = list(read_prompts(one.rows, one.config, tokenizer, first))
    source = one.rows.describe()
    if not prompts:
        raise DataError(f"{source} has no rows, so there is nothing to train on")
    lengths = np.array([len(prompt) for prompt in prompts])
    kept = _fitting(prompts, lengths, config, source)
    tokens = sum(len(prompt) for prompt in kept)
    warnings = []
    if dropped := len(prompts) - len(kept):
        warnings.append(f"{dropped:,} prompts are too long for their answers and were dropped")
    if alike := len(kept) - len({prompt.tokens.tobytes() for prompt in kept}):
        warnings.append(f"{alike:,} prompts are in the set more than once")
    examination = Examination(
        source=source,
        rows=len(prompts),
        examples=len(kept),
        tokens=tokens,
        trained_tokens=0,
        max_length=config.data.max_length,
        truncated=0,
        dropped=dropped,
        sequences=len(kept),
        fill=tokens / (len(kept) * config.data.max_length),
        quantiles=length_quantiles(lengths),
        histogram=histogram(lengths),
        formats={"prompt": len(prompts)},
        holds=dict(Counter(feature for prompt in prompts for feature in _features(prompt))),
        warnings=tuple(warnings),
    )
    return TrainSet(name=one.name, examples=list(kept), examination=examination)


def _fitting(prompts: list[Prompt], lengths: np.ndarray, config: RunConfig, source: str) -> list[Prompt]:
    """The prompts that leave room for an answer, by `data.truncation`."""
    answer = config.rollout.max_completion_length
    most = config.data.max_length - answer
    over = [prompt for prompt in prompts if len(prompt) > most]
    if over and config.data.truncation == "refuse":
        raise DataError(
            f"{len(over):,} of {len(prompts):,} prompts of {source} do not fit into "
            f"data.max_length={config.data.max_length} with answers of rollout.max_completion_length={answer} tokens: "
            f"{listed([prompt.where for prompt in over], NAMED)}. The longest has {int(lengths.max()):,} tokens. Set "
            f"data.max_length={int(lengths.max()) + answer}, or data.truncation='drop'."
        )
    kept = [prompt for prompt in prompts if len(prompt) <= most]
    if not kept:
        raise DataError(
            f"none of the {len(prompts):,} prompts of {source} fits into data.max_length={config.data.max_length} with "
            f"answers of rollout.max_completion_length={answer} tokens; the shortest has {int(lengths.min()):,}. Raise "
            "data.max_length."
        )
    return kept


def _features(prompt: Prompt) -> list[str]:
    messages = () if isinstance(prompt.messages, str) else prompt.messages
    features = {
        "a system message": any(message["role"] in ("system", "developer") for message in messages),
        "earlier answers": any(message["role"] == "assistant" for message in messages),
        "tools": bool(prompt.tools),
        "a reference": prompt.reference is not None,
    }
    return [name for name, present in features.items() if present]
