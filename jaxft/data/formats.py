"""Readers of the common row formats: each row becomes a `Conversation`."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxft.config import DataConfig
from jaxft.data.chat.reasoning import FIELDS
from jaxft.data.chat.template_text import RESERVED
from jaxft.data.chat.tool_calls import BadCall, calls_of, tools_of
from jaxft.data.sources import Rows
from jaxft.errors import DataError, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# ShareGPT's names of speakers; function_call is an assistant turn that calls a tool.
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "system": "system", "observation": "tool", "tool": "tool", "function_call": "assistant",
}  # fmt: skip

# Fields that a turn of ShareGPT may have in addition to its text, as OpenAI's messages do.
TURN_FIELDS = (*FIELDS, "train", "weight", "name", "tool_calls", "tool_call_id")
# The number of a row whose answer is labelled: 1 if it is good, 0 if it is bad.
DESIRABLE = "desirable"


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One row, whatever its format: a chat (messages), or plain text (prompt and completion).

    row: index in its source. part: index among the conversations of this row. where: the row's name in errors. format:
    the format it was written in.
    messages: OpenAI messages, empty for plain text. tools: JSON schemas that the template may show.
    first_trained: index of the first message that may be trained on. untrained: indices of answers marked as not to be
    trained. template_kwargs: variables of the chat template for this row, such as enable_thinking.
    prompt, completion: plain text; the prompt of a `text` row is empty. values: numbers of the row that a training
    method reads, such as a margin or a label, by name.
    """

    row: int
    where: str
    format: str
    part: int = 0
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    first_trained: int = 0
    untrained: frozenset[int] = frozenset()
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""
    completion: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


def conversations(rows: Rows, config: DataConfig, left_out: Counter[str]) -> Iterator[Conversation]:
    """Every row as a Conversation, in order; none is left out. Raises DataError at the first that cannot be one."""
    for index in range(len(rows)):
        yield read_row(rows[index], config, row=index, where=rows.where(index))


def read_row(fields: Mapping[str, Any], config: DataConfig, *, row: int, where: str) -> Conversation:
    """One row as a Conversation, by `config.format` or by the fields that it has.

    row: its index. where: its name in errors. Raises DataError if it cannot be one.
    """
    name = config.format if config.format != "auto" else detect(fields, config, where)
    try:
        read = READERS[name].read(fields, config)
        if "messages" in read:
            read |= _marks(read["messages"]) | {
                "tools": tools_of(fields),
                "template_kwargs": template_kwargs_of(fields),
            }
        return Conversation(row=row, where=where, format=name, **read)
    except (RowProblem, BadCall) as problem:
        raise DataError(f"{where} ({name}): {problem}") from problem


def detect(row: Mapping[str, Any], config: DataConfig, where: str) -> str:
    """The one format whose fields the row has. Raises DataError if none fits, or more than one."""
    wanted = {name: reader.keys(config) for name, reader in READERS.items()}
    fitting = [name for name, fields in wanted.items() if all(row.get(field) is not None for field in fields)]
    if len(fitting) == 1:
        return fitting[0]
    keys = ", ".join(sorted(row)) or "none"
    if fitting:
        raise DataError(
            f"{where} can be read as {' or as '.join(fitting)} (its keys: {keys}). Set data.format to the one you mean."
        )
    known = "; ".join(f"{name}: {' + '.join(fields)}" for name, fields in wanted.items())
    raise DataError(
        f"{where} is of no known format: its keys are {keys}. Known formats and the keys they need: {known}. "
        "Set data.prompt_field, data.completion_field or data.text_field to your column names."
    )


class RowProblem(ValueError):
    """A problem with a row; `read_row` adds the row's name."""


def _messages(row: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    return {"messages": check_messages(_field(row, "messages"), "messages")}


def _prompt_completion(row: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    prompt, completion = _field(row, config.prompt_field), _field(row, config.completion_field)
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise RowProblem(f"{config.completion_field!r} is empty, so there is nothing to train on")
        return {"prompt": prompt, "completion": completion}
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowProblem(
            f"{config.prompt_field!r} is {type(prompt).__name__} and {config.completion_field!r} is "
            f"{type(completion).__name__}: both must be text, or both lists of messages"
        )
    before = check_messages(prompt, config.prompt_field, answer=False)
    after = check_messages(completion, config.completion_field)
    return {"messages": before + after, "first_trained": len(before)}


def _alpaca(row: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    messages = [*alpaca_prompt(row), {"role": "assistant", "content": _field(row, "output")}]
    return {"messages": check_messages(messages, "instruction/output")}


def alpaca_prompt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of an alpaca row before its answer, not yet checked. Raises RowProblem if they cannot be read."""
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    for pair in row.get("history") or ():
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RowProblem(f"'history' must be a list of [question, answer] pairs; one is {str(pair)[:60]!r}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = _field(row, "instruction")
    if row.get("input"):
        question = f"{question}\n{row['input']}"
    return [*messages, {"role": "user", "content": question}]


def _sharegpt(row: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    return {"messages": check_messages(sharegpt_messages(row), "conversations")}


def sharegpt_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a sharegpt row as messages, not yet checked. Raises RowProblem if they cannot be read."""
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    turns = as_list(_field(row, "conversations"), "conversations")
    return messages + [sharegpt_message(turn, number) for number, turn in enumerate(turns, 1)]


def sharegpt_message(turn: Mapping[str, Any], number: int) -> dict[str, Any]:
    """One turn as a message, not yet checked. number: its place, from 1. Raises RowProblem for an unknown speaker."""
    speaker = turn.get("from", turn.get("role"))
    if speaker not in SPEAKERS:
        hint = did_you_mean(str(speaker), SPEAKERS)
        raise RowProblem(f"turn {number} is from {speaker!r}; known: {', '.join(SPEAKERS)}.{hint}")
    value = turn.get("value", turn.get("content"))
    message = {"role": SPEAKERS[speaker], "content": value}
    if speaker == "function_call":
        message = {"role": "assistant", "tool_calls": value}
    return {name: turn[name] for name in TURN_FIELDS if name in turn} | message


def _text(row: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    text = _field(row, config.text_field)
    if not isinstance(text, str) or not text:
        raise RowProblem(f"{config.text_field!r} is empty or not text: {str(text)[:60]!r}")
    return {"completion": text}


class Reader(NamedTuple):
    """How rows of one format are read. keys: of a config, those that a row of the format always has.

    read: from a row to the fields of its Conversation.
    """

    keys: Callable[[DataConfig], tuple[str, ...]]
    read: Callable[[Mapping[str, Any], DataConfig], dict[str, Any]]


READERS = {
    "messages": Reader(lambda config: ("messages",), _messages),
    "sharegpt": Reader(lambda config: ("conversations",), _sharegpt),
    "prompt_completion": Reader(lambda config: (config.prompt_field, config.completion_field), _prompt_completion),
    "alpaca": Reader(lambda config: ("instruction", "output"), _alpaca),
    "text": Reader(lambda config: (config.text_field,), _text),
}


def _field(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise RowProblem(f"no field {name!r}; its keys are {', '.join(sorted(row)) or 'none'}")
    return row[name]


def as_list(value: Any, field: str) -> list[Mapping[str, Any]]:
    """A list of objects, in whichever way a table stores it. Raises RowProblem if it is none, or empty."""
    # Columnar stores return a list of objects as an object of lists.
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise RowProblem(f"{field!r} must be a list with at least one message; it is {str(value)[:60]!r}")
    for number, item in enumerate(value, 1):
        if not isinstance(item, Mapping):
            raise RowProblem(f"{field!r} entry {number} is not a message: {str(item)[:60]!r}")
    return value


def check_messages(value: Any, field: str, *, answer: bool = True) -> tuple[dict[str, Any], ...]:
    """Messages that can be rendered. answer: at least one must come from the assistant."""
    messages = tuple(_message(message, number) for number, message in enumerate(as_list(value, field), 1))
    if answer and not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise RowProblem(f"{field!r} has no assistant message to train on (roles: {roles})")
    return messages


def _message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    # Tables fill absent fields with None; templates test whether a field exists.
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise RowProblem(
            f"message {number} has role {role!r}; known: {', '.join(ROLES)}.{did_you_mean(str(role), ROLES)}"
        )
    calls = calls_of(message, number)
    message = {k: v for k, v in message.items() if k not in ("tool_calls", "function_call")}
    if calls:
        message["tool_calls"] = calls
    for name in FIELDS:
        if not isinstance(message.get(name, ""), str):
            raise RowProblem(
                f"message {number} ({role}) has {name} of type {type(message[name]).__name__}; it must be text"
            )
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = content = _join_text(content, number)
    if content is not None and not isinstance(content, str):
        raise RowProblem(f"message {number} ({role}) has content of type {type(content).__name__}; it must be text")
    may_be_empty = role in ("system", "developer", "tool", "function") or "tool_calls" in message
    if not may_be_empty and not (content or "").strip():
        raise RowProblem(f"message {number} ({role}) has empty content; remove the message or the row")
    message.setdefault("content", "")
    return message


def _join_text(parts: list[Any], number: int) -> str:
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise RowProblem(f"message {number} has content parts that are not text; only text is trained")
    return "".join(part["text"] for part in parts)


def _marks(messages: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """The messages without their `train` and `weight` fields, and the answers that these exclude from training.

    `train: true/false` and OpenAI's `weight: 0/1` mean the same; a message without either is trained.
    """
    untrained, bare = set(), []
    for index, message in enumerate(messages):
        marks = {name: message[name] for name in ("train", "weight") if name in message}
        for name, value in marks.items():
            if value not in (0, 1):
                raise RowProblem(f"message {index + 1} has {name}: {value!r}; it may be 0 or 1, or false or true")
        if len({bool(value) for value in marks.values()}) > 1:
            raise RowProblem(f"message {index + 1} has train: {marks['train']} and weight: {marks['weight']}; keep one")
        if any(marks.values()) and message["role"] != "assistant":
            raise RowProblem(
                f"message {index + 1} ({message['role']}) is marked to be trained, but only answers can be: remove its "
                "train or weight, or train on everything with data.train_on='all'"
            )
        if marks and not any(marks.values()) and message["role"] == "assistant":
            untrained.add(index)
        bare.append({name: value for name, value in message.items() if name not in marks})
    return {"messages": tuple(bare), "untrained": frozenset(untrained)}


def template_kwargs_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the chat template that a row gives as `chat_template_kwargs`. Raises RowProblem."""
    given = row.get("chat_template_kwargs") or {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise RowProblem(f"'chat_template_kwargs' is text but not JSON: {error}") from error
    if not isinstance(given, Mapping) or set(given) & set(RESERVED):
        raise RowProblem(
            f"'chat_template_kwargs' must be an object of variables other than {', '.join(RESERVED)}; it is "
            f"{str(given)[:60]!r}"
        )
    return dict(given)
