"""How rows of each format are read: from the columns of a row to the fields of its Conversation.

A reader returns the columns that it read too, so that no other column is dropped without a word.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.config import DataConfig
from jaxft.data.chat.reasoning import FIELDS
from jaxft.data.rows.columns import is_empty
from jaxft.data.rows.messages import check_messages
from jaxft.data.rows.questions import QUESTIONS, question_columns, question_messages, with_system
from jaxft.data.rows.turn_lists import holds_messages, holds_turns, is_chat
from jaxft.data.rows.values import RowProblem, is_absent, parse_json, sample, text_of

# Columns of lists of messages that are found by themselves, if they hold any.
TURNS = (
    "messages", "conversation", "dialog", "dialogue", "dialogs", "chat", "chat_messages", "turns", "contents", "data",
)  # fmt: skip
# A list of texts here may be the questions of several turns, as in MT-Bench, so only messages are read by themselves.
QUESTIONS_ALONE = ("turns",)

# Columns of the thoughts before the answer of a question in a column of its own.
THOUGHTS = (*FIELDS, "thoughts", "cot", "chain_of_thought", "Complex_CoT")

# From a row: the fields of its Conversation, and the columns that were read.
Read = tuple[dict[str, Any], set[str]]


def _messages(row: Mapping[str, Any], config: DataConfig) -> Read:
    names = _turn_columns(row, config)
    if len(names) > 1:
        raise RowProblem(
            f"its messages may be in {' or in '.join(map(repr, names))}. Set data.messages_field to the one they are in"
        )
    return _turns(row, names[0] if names else config.messages_field or "messages", config)


def _sharegpt(row: Mapping[str, Any], config: DataConfig) -> Read:
    return _turns(row, config.messages_field or "conversations", config)


def _turns(row: Mapping[str, Any], name: str, config: DataConfig) -> Read:
    messages, untrained, unread = check_messages(_field(row, name), name, config)
    messages, shift, columns = _system_first(row, messages, config)
    untrained = frozenset(index + shift for index in untrained)
    return {"messages": messages, "untrained": untrained, "unread": unread}, {name, *columns}


def _prompt_completion(row: Mapping[str, Any], config: DataConfig) -> Read:
    names = config.prompt_field, config.completion_field
    prompt, completion = (_field(row, name) for name in names)
    chats = [is_chat(value) or holds_messages(value) for value in (prompt, completion)]
    chats[0] = chats[0] or prompt == []  # of completions, a list may be the text of the answer
    if not any(chats):
        prompt, completion = text_of(prompt, repr(names[0])), text_of(completion, repr(names[1]))
        if not completion:
            raise RowProblem(f"{names[1]!r} is empty, so there is nothing to train on")
        return {"prompt": prompt, "completion": completion}, set(names)
    if chats[0] and not chats[1]:
        completion = [{"role": "assistant", "content": completion}]
    elif not chats[0]:
        raise RowProblem(
            f"{names[0]!r} is {type(prompt).__name__} and {names[1]!r} is {type(completion).__name__}: both must be "
            "text, or both lists of messages"
        )
    before, _, unread = check_messages(prompt, names[0], config, answer=False)
    after, untrained, unread_after = check_messages(completion, names[1], config)
    before, _, columns = _system_first(row, before, config)
    return {
        "messages": before + after,
        "first_trained": len(before),
        "untrained": frozenset(len(before) + index for index in untrained),
        "unread": unread + unread_after,
    }, {*names, *columns}


def _alpaca(row: Mapping[str, Any], config: DataConfig) -> Read:
    _field(row, "instruction")
    return _question_and_answer(row, "instruction", "output", config)


def _qa(row: Mapping[str, Any], config: DataConfig) -> Read:
    pairs = question_columns(row, config)
    if len(pairs) != 1:
        either = " or ".join(f"{question} + {answer}" for question, answer in pairs or QUESTIONS)
        raise RowProblem(
            f"its question and answer may be in {either} (its keys: {', '.join(sorted(row))}). Set data.prompt_field "
            "and data.completion_field to the columns that they are in"
        )
    return _question_and_answer(row, *pairs[0], config)


def _question_and_answer(row: Mapping[str, Any], question: str, answer: str, config: DataConfig) -> Read:
    given, columns = question_messages(row, question, config)
    # White space before an answer is meant for plain text, which is continued as it is.
    text = text_of(_field(row, answer), repr(answer)).lstrip()
    answered = {"role": "assistant", "content": text}
    names = [name for name in THOUGHTS if name not in columns and not is_empty(row.get(name))]
    if len(names) > 1:
        raise RowProblem(f"its thoughts may be in {' or in '.join(names)}: leave one out by data.ignored_columns")
    if names:
        answered[FIELDS[0]] = row[names[0]]
    given.append(answered)
    messages, _, _ = check_messages(given, f"{question}/{answer}", config)
    messages, _, of_system = _system_first(row, messages, config)
    return {"messages": messages}, {answer, *names, *columns, *of_system}


def _segments(row: Mapping[str, Any], config: DataConfig) -> Read:
    """Texts of which each says whether it is trained (axolotl's input_output): a prompt, and what continues it."""
    segments = _field(row, "segments")
    segments = parse_json(segments, "'segments'") if isinstance(segments, str) else segments
    if not isinstance(segments, list) or not all(isinstance(one, Mapping) and "text" in one for one in segments):
        raise RowProblem(f"'segments' must be a list of objects with text and label; it is {sample(segments)!r}")
    texts = {False: "", True: ""}
    for number, one in enumerate(segments, 1):
        label = one.get("label")
        if not isinstance(label, bool) or set(one) - {"text", "label"}:
            raise RowProblem(f"segment {number} must have text, a label that is true or false, and nothing else")
        text = text_of(one["text"], f"segment {number}")
        if texts[True] and not label and text:
            raise RowProblem(
                f"segment {number} is not trained, but follows one that is: only a text that ends in all that is "
                "trained can be read. Write it as messages, in which any answer may have train: false, or as several "
                "rows"
            )
        texts[label] += text
    if not texts[True]:
        raise RowProblem("no segment has the label true, so there is nothing to train on")
    return {"prompt": texts[False], "completion": texts[True]}, {"segments"}


def _text(row: Mapping[str, Any], config: DataConfig) -> Read:
    text = text_of(_field(row, config.text_field), repr(config.text_field))
    if not text:
        raise RowProblem(f"{config.text_field!r} is empty")
    return {"completion": text}, {config.text_field}


def _system_first(
    row: Mapping[str, Any], messages: Sequence[dict[str, Any]], config: DataConfig
) -> tuple[tuple[dict[str, Any], ...], int, set[str]]:
    """(messages with the row's own system prompt, how many were added, the columns that were read for it)."""
    out, columns = with_system(row, messages, config)
    return tuple(out), len(out) - len(messages), columns


class Reader(NamedTuple):
    """How rows of one format are read. keys: of a config, those that a row of the format always has.

    read: from a row to the fields of its Conversation, and the columns that were read. fits: whether a row has the
    format.
    """

    keys: Callable[[DataConfig], tuple[str, ...]]
    read: Callable[[Mapping[str, Any], DataConfig], Read]
    fits: Callable[[Mapping[str, Any], DataConfig], bool]


def _has(keys: Callable[[DataConfig], tuple[str, ...]]) -> Callable[[Mapping[str, Any], DataConfig], bool]:
    return lambda row, config: all(not is_absent(row.get(key)) for key in keys(config))


def _turn_columns(row: Mapping[str, Any], config: DataConfig) -> list[str]:
    """The columns that may hold the messages of a row."""
    if config.messages_field is not None:
        return [config.messages_field] if not is_absent(row.get(config.messages_field)) else []
    return [name for name in TURNS if name in row and _holds_turns(name, row[name])]


def _holds_turns(name: str, value: Any) -> bool:
    if name in QUESTIONS_ALONE and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return False
    return holds_turns(value) or (name == "messages" and not is_absent(value))


def _keys_of_sharegpt(config: DataConfig) -> tuple[str, ...]:
    return (config.messages_field or "conversations",)


def _prompt_and_completion(config: DataConfig) -> tuple[str, ...]:
    return config.prompt_field, config.completion_field


READERS = {
    "messages": Reader(
        lambda config: (config.messages_field or "messages",),
        _messages,
        lambda row, config: bool(_turn_columns(row, config)),
    ),
    "sharegpt": Reader(
        _keys_of_sharegpt,
        _sharegpt,
        lambda row, config: config.messages_field is None and _has(_keys_of_sharegpt)(row, config),
    ),
    "prompt_completion": Reader(_prompt_and_completion, _prompt_completion, _has(_prompt_and_completion)),
    "alpaca": Reader(lambda config: ("instruction", "output"), _alpaca, _has(lambda config: ("instruction", "output"))),
    "qa": Reader(lambda config: QUESTIONS[0], _qa, lambda row, config: len(question_columns(row, config)) == 1),
    "segments": Reader(lambda config: ("segments",), _segments, _has(lambda config: ("segments",))),
    "text": Reader(lambda config: (config.text_field,), _text, _has(lambda config: (config.text_field,))),
}


def _field(row: Mapping[str, Any], name: str) -> Any:
    if is_absent(row.get(name)):
        problem = f"{name} is null" if name in row else f"no field {name!r}"
        raise RowProblem(f"{problem}; its keys are {', '.join(sorted(row)) or 'none'}")
    return row[name]
