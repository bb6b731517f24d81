"""Rows of prompts: the model answers them while it trains, and rewards judge its answers."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxft.config import DataConfig, RunConfig
from jaxft.data.batch import Example
from jaxft.data.chat.arrange import arrange, names_of
from jaxft.data.chat.encode import bos_of
from jaxft.data.chat.reasoning import split_thoughts
from jaxft.data.chat.tool_calls import BadCall
from jaxft.data.chat.turns import render
from jaxft.data.examine import Examination, changes, combine_examinations, count_repeated, histogram
from jaxft.data.examine_pairs import length_quantiles
from jaxft.data.formats import Conversation, extras_of
from jaxft.data.preferences.prompts import messages_of, prompt_in
from jaxft.data.prepare import Prepared, RowSet, TrainSet, open_sets
from jaxft.data.rows.bad_rows import BadRows, OnBadRow, refuse
from jaxft.data.rows.columns import Unread, UnreadColumns
from jaxft.data.rows.messages import check_messages
from jaxft.data.rows.questions import Message, system_of, with_system
from jaxft.data.rows.refusals import check_rows
from jaxft.data.rows.turn_lists import as_list
from jaxft.data.rows.values import RowProblem, present, refuse_unwritable
from jaxft.data.sources import Rows
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.data.truncation import ModelLimits, mend_for_length
from jaxft.errors import DataError, listed
from jaxft.nn.virtual import virtual_ids

NAMED = 10  # rows named in one error
# The column under which reward functions find the answer of a row, whatever its column is called.
REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt(Example):
    """The tokens of a prompt, none of which is trained.

    messages: the prompt as reward functions see it, text or messages. tools, template_kwargs: what its rendering reads
    beside the messages. columns: the other columns of its row, and its answer as REFERENCE if it has one. unread: keys
    of its messages that nothing reads. where: the name of the row in errors.
    """

    messages: str | tuple[Message, ...]
    where: str
    tools: tuple[dict[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[Unread, ...] = ()

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
        eval_names=[
            prompt.where for prompt in questions if isinstance(prompt, Prompt) and prompt.reference is not None
        ],
        eval_examination=eval_examination,
    )


def read_prompts(
    rows: Rows,
    config: DataConfig,
    tokenizer: Tokenizer,
    first: Sequence[int] = (),
    *,
    notes: Counter[str] | None = None,
    on_bad: OnBadRow = refuse,
) -> Iterator[Prompt]:
    """The prompt of every row, in order. first: token ids at the start of each, such as those of virtual tokens.

    The prompt is in `data.prompt_field`, or where preferences have it, as text or messages; or it is the messages of a
    conversation before its last answer, which is then the row's REFERENCE. So are the columns `data.completion_field`
    and `output`. notes: as `encode_all` counts them. on_bad: takes rows that have no prompt; by default the first of
    them raises DataError.
    """
    notes = Counter[str]() if notes is None else notes
    for index in range(len(rows)):
        where = rows.where(index)
        try:
            fields = {k: v for k, v in present(rows[index]).items() if k not in config.ignored_names}
            prompt = _prompt(fields, config, tokenizer, notes, row=index, where=where, first=first)
        except DataError as error:
            on_bad(index, where, error)
        except (RowProblem, BadCall) as problem:
            on_bad(index, where, DataError(f"{where}: {problem}"))
        except RecursionError:
            on_bad(index, where, DataError(f"{where} is nested too deeply to be read"))
        else:
            yield prompt


def _prompt(
    fields: Mapping[str, Any],
    config: DataConfig,
    tokenizer: Tokenizer,
    notes: Counter[str],
    *,
    row: int,
    where: str,
    first: Sequence[int],
) -> Prompt:
    given, answer, used = prompt_and_answer(fields, config)
    columns = {name: value for name, value in fields.items() if name not in used}
    if answer is not None:
        columns.setdefault(REFERENCE, answer)
    if isinstance(given, str):
        if not given:
            raise RowProblem("its prompt is empty")
        refuse_unwritable(given, "its prompt")
        text, of_system = system_of(fields, config)
        if text is not None:
            name = next(iter(sorted(of_system)))
            raise RowProblem(
                f"its prompt is plain text, which has no room for the system prompt in {name!r}. Write the prompt as "
                f"messages, or leave the column out by data.ignored_columns={name!r}"
            )
        ids = [*bos_of(tokenizer), *tokenizer.encode(given)]
        tokenizer.check_rows(ids, where)
        return _with_tokens(ids, first, row, where, given, columns=columns)
    messages, _, unread = check_messages(given, config.prompt_field, config, answer=False)
    if messages[-1]["role"] == "assistant":
        raise RowProblem("its prompt ends in an answer, so that there is nothing to answer: remove the last message")
    refuse_unwritable(messages, "its prompt")
    chat = Conversation(row=row, where=where, format="prompt", messages=messages, **extras_of(fields))
    chat = arrange(chat, tokenizer, config, notes)
    ids = tokenizer.encode(render(chat, tokenizer, len(chat.messages), add_generation_prompt=True))
    tokenizer.check_rows(ids, where)
    return _with_tokens(
        ids,
        first,
        row,
        where,
        chat.messages,
        columns=columns,
        tools=chat.tools,
        template_kwargs=chat.template_kwargs,
        unread=unread,
    )


def _with_tokens(
    ids: Sequence[int], first: Sequence[int], row: int, where: str, messages: str | tuple[Message, ...], **more: Any
) -> Prompt:
    tokens = np.array([*first, *ids], np.int32)
    return Prompt(tokens=tokens, mask=np.zeros(len(tokens), np.uint8), row=row, where=where, messages=messages, **more)


def prompt_and_answer(
    fields: Mapping[str, Any], config: DataConfig
) -> tuple[str | list[Message], str | None, Collection[str]]:
    """The prompt of a row, the answer that it gives, if any, and the columns that the prompt is from."""
    turns = next((name for name in (config.messages_field, "messages") if name and name in fields), None)
    if config.prompt_field in fields or turns is None:
        prompt, used = prompt_in(fields, config)
        conversation = "conversations" in used
    else:
        prompt, conversation = messages_of(as_list(fields[turns], turns), turns), True
        if isinstance(prompt, str):
            raise RowProblem(f"{turns!r} is no list of messages")
        prompt, of_system = with_system(fields, prompt, config)
        used = {turns, *of_system}
    if prompt is None:
        raise RowProblem(
            f"it has no prompt. A row needs {config.prompt_field!r}, or messages. Set data.prompt_field to the column "
            f"of prompts (its keys: {', '.join(sorted(fields)) or 'none'})."
        )
    if conversation and not isinstance(prompt, str):
        answers = [number for number, message in enumerate(prompt) if message.get("role") == "assistant"]
        if answers and answers[-1] == len(prompt) - 1:
            content = prompt[-1].get("content")
            return prompt[:-1], split_thoughts(content)[1] if isinstance(content, str) else None, used
        return prompt, None, used
    answer = fields.get(config.completion_field, fields.get("output"))
    if isinstance(answer, list) and answer and isinstance(answer[-1], Mapping):
        answer = answer[-1].get("content")
    return prompt, answer if isinstance(answer, str) else None, used


def _prepare_set(one: RowSet, config: RunConfig, tokenizer: Tokenizer) -> TrainSet:
    first = virtual_ids(config.adapter.virtual_tokens)
    source = one.rows.describe()
    bad, unread, notes = BadRows(), UnreadColumns(template_names=names_of(tokenizer)), Counter[str]()
    prompts = list(read_prompts(one.rows, one.config, tokenizer, first, notes=notes, on_bad=bad.add))
    for prompt in prompts:
        unread.add(prompt.unread)
    check_rows(bad, unread, one.config, len(one.rows), source)
    if not prompts:
        raise DataError(f"{source} has no rows, so there is nothing to train on")
    lengths = np.array([len(prompt) for prompt in prompts])
    kept = _fitting(prompts, lengths, config, source, ModelLimits.of(tokenizer))
    tokens = sum(len(prompt) for prompt in kept)
    warnings = changes(notes, len(bad))
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
        skipped=len(bad),
        bad_rows=bad.messages,
        unread=unread.listed,
    )
    return TrainSet(name=one.name, examples=list(kept), examination=examination)


def _fitting(
    prompts: list[Prompt], lengths: np.ndarray, config: RunConfig, source: str, model: ModelLimits
) -> list[Prompt]:
    """The prompts that leave room for an answer, by `data.truncation`."""
    answer = config.rollout.max_completion_length
    most = config.data.max_length - answer
    over = [prompt for prompt in prompts if len(prompt) > most]
    kept = [prompt for prompt in prompts if len(prompt) <= most]
    if over and config.data.truncation == "refuse":
        raise DataError(
            f"{len(over):,} of {len(prompts):,} prompts of {source} do not fit into "
            f"data.max_length={config.data.max_length} with answers of rollout.max_completion_length={answer} tokens: "
            f"{listed([prompt.where for prompt in over], NAMED)}. The longest has {int(lengths.max()):,} tokens. "
            + mend_for_length(int(lengths.max()) + answer, model.positions, ["drop"] if kept else [])
        )
    if not kept:
        raise DataError(
            f"none of the {len(prompts):,} prompts of {source} fits into data.max_length={config.data.max_length} with "
            f"answers of rollout.max_completion_length={answer} tokens; the shortest has {int(lengths.min()):,}. "
            + mend_for_length(int(lengths.min()) + answer, model.positions, [])
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
