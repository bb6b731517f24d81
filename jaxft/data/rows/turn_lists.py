"""Lists of turns in a cell, in the forms that files have, as lists of objects with a role and a content."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.config.data import ROLES
from jaxft.data.rows.questions import QUESTIONS
from jaxft.data.rows.values import RowProblem, is_absent, parse_json, sample

ROLE_KEYS = ("role", "from", "speaker", "author")
CONTENT_KEYS = ("content", "value", "parts", "text")
CALL_KEYS = ("tool_calls", "function_call")
# Names of speakers in the files of other trainers.
SPEAKERS = {
    **{role: role for role in ROLES}, "human": "user", "prompter": "user", "gpt": "assistant",
    "chatgpt": "assistant", "model": "assistant",
    "observation": "tool", "tool_response": "tool", "tool_result": "tool", "function_response": "tool",
    "ipython": "tool", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
# Keys of an object that is a question and its answer, as in Capybara (input and output) and MOSS (human and assistant).
EXCHANGES = (
    *QUESTIONS, ("human", "assistant"), ("human", "gpt"), ("human", "bot"), ("user", "bot"), ("prompt", "completion"),
)  # fmt: skip
# What is read of a text without a name of its speaker, by whether its position is even.
ALTERNATING = {True: "user", False: "assistant"}


def as_list(value: Any, field: str) -> list[Mapping[str, Any]]:
    """A list of objects, in whichever way a table or a file stores it. Raises RowProblem if it is none, or empty.

    A list of texts is a conversation that the user begins, as in LIMA and UltraChat. Objects of a question and an
    answer, and lists of two texts, are exchanges; a list of two texts may also be a speaker and what is said.
    """
    if isinstance(value, str):
        value = parse_json(value, repr(field))
    # Columnar stores return a list of objects as an object of lists.
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise RowProblem(f"{field!r} holds lists of different lengths: {sample(value)!r}")
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise RowProblem(f"{field!r} must be a list with at least one message; it is {sample(value)!r}")
    value = _with_roles(value)
    for number, item in enumerate(value, 1):
        if not isinstance(item, Mapping):
            raise RowProblem(
                f"{field!r} entry {number} is not a message: {sample(item)!r}. A conversation is a list of objects "
                "with role and content, of objects with a question and an answer, or of texts alone"
            )
    return value


def holds_messages(value: Any) -> bool:
    """Whether a cell looks like a list of objects with a role and a content, or like JSON text of one."""
    value = _parsed(value)
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, Mapping):
        return False
    return any(key in first for key in ROLE_KEYS) and any(key in first for key in (*CONTENT_KEYS, *CALL_KEYS))


def holds_turns(value: Any) -> bool:
    """Whether a cell looks like a conversation in any form that `as_list` reads, or like JSON text of one.

    A list of texts is one if it has more than one: so some files write a text that stands alone.
    """
    value = _parsed(value)
    if holds_messages(value):
        return True
    if not isinstance(value, list) or not value:
        return False
    texts = all(isinstance(item, str) for item in value)
    return len(value) > 1 if texts else _with_roles(value) is not value


def is_chat(value: Any) -> bool:
    """Whether a cell is a list of messages, possibly a damaged one: not text, and not just any list."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and any(key in first for key in ("role", "from", "content"))


def _parsed(value: Any) -> Any:
    """What the JSON text of a list spells; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return parse_json(value, "")
    except RowProblem:
        return value


def _with_roles(items: list[Any]) -> list[Any]:
    """The items as messages if all are texts, exchanges, or texts under the names of their speakers; else `items`."""
    if all(isinstance(item, str) for item in items):
        return [_message(ALTERNATING[number % 2 == 0], text) for number, text in enumerate(items)]
    if all(isinstance(item, list | tuple) and len(item) == 2 for item in items):
        return _of_pairs(items)
    if all(isinstance(item, Mapping) and not any(key in item for key in ROLE_KEYS) for item in items):
        if all(len(item) == 1 and str(next(iter(item))).lower() in SPEAKERS for item in items):
            return [_message(str(role), text) for item in items for role, text in item.items()]
        keys = [_exchange_keys(item) for item in items]
        if all(keys):
            return [message for item, pair in zip(items, keys, strict=True) for message in _exchange(item, *pair)]
    return items


def _of_pairs(pairs: Sequence[Sequence[Any]]) -> list[Any]:
    if all(isinstance(first, str) and first.strip().lower() in SPEAKERS for first, _ in pairs):
        return [_message(role, text) for role, text in pairs]
    return [message for question, answer in pairs for message in _exchange({"q": question, "a": answer}, "q", "a")]


def _exchange_keys(item: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of the question and of the answer in an object; empty without them, or if several could be."""
    keys = [pair for pair in EXCHANGES if all(key in item for key in pair)]
    return keys[0] if len(keys) == 1 else ()


def _exchange(item: Mapping[str, Any], question: str, answer: str) -> list[dict[str, Any]]:
    """The messages of a question and an answer; other keys, such as marks, belong to the answer."""
    rest = {key: value for key, value in item.items() if key not in (question, answer)}
    asks = [] if is_absent(item[question]) else [_message("user", item[question])]
    # A conversation may end in a question.
    return asks if is_absent(item[answer]) and not rest else [*asks, {**_message("assistant", item[answer]), **rest}]


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}
