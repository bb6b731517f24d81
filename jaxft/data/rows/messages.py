"""Messages of rows in one form, OpenAI's, from the forms that files have: roles, contents, calls and marks."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.config import DataConfig
from jaxft.data.chat.reasoning import FIELDS
from jaxft.data.chat.tool_calls import calls_of
from jaxft.data.rows.columns import Unread, split_ignored, unread_keys
from jaxft.data.rows.marks import split_marks
from jaxft.data.rows.turn_lists import CALL_KEYS, CONTENT_KEYS, ROLE_KEYS, SPEAKERS, as_list
from jaxft.data.rows.values import RowProblem, present, sample, text_of
from jaxft.errors import did_you_mean

PLAIN_ROLES = frozenset(("system", "user", "assistant"))
CALLERS = ("function_call", "tool_call")  # speakers whose text is the JSON of one call, or of a list of them
PART_KEYS = frozenset(("type", "text"))


def check_messages(
    value: Any, field: str, config: DataConfig, *, answer: bool = True
) -> tuple[tuple[dict[str, Any], ...], frozenset[int], tuple[Unread, ...]]:
    """(messages that can be rendered, indices of answers marked as not to be trained, keys that jaxft does not read).

    value: a list of messages, or JSON text of one. field: its column. answer: at least one must be the assistant's.
    Raises RowProblem, and BadCall for tool calls that cannot be read.
    """
    messages, untrained, unread = [], set(), list[Unread]()
    for number, given in enumerate(as_list(value, field), 1):
        message, trained, unread_of_one = _message(given, number, config)
        messages.append(message)
        unread += unread_of_one
        if trained and message["role"] != "assistant":
            raise RowProblem(
                f"message {number} ({message['role']}) is marked to be trained, but only answers can be: remove its "
                "mark (such as train or weight), or train on everything with data.train_on='all'"
            )
        if trained is False and message["role"] == "assistant":
            untrained.add(number - 1)
    if answer and not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise RowProblem(f"{field!r} has no assistant message to train on (roles: {roles})")
    return tuple(messages), frozenset(untrained), tuple(unread)


def role_of(given: Any, key: str, number: int, config: DataConfig) -> tuple[str, bool]:
    """(role, whether the text of the message is a call of a tool) by the name of a speaker.

    key: under which the name is. number: of the message. Raises RowProblem for an unknown name.
    """
    own, speaker = config.role_names, str(given).strip().lower()
    if str(given) in own:
        return own[str(given)], False
    if speaker not in SPEAKERS:
        is_from = f"turn {number} is from" if key == "from" else f"message {number} has {key}"
        hint = did_you_mean(speaker, SPEAKERS)
        raise RowProblem(
            f"{is_from} {given!r}; known: {', '.join(SPEAKERS)}.{hint} To use names of your own, set data.roles, such "
            f"as '{given}=assistant'."
        )
    return SPEAKERS[speaker], speaker in CALLERS


def _message(
    given: Mapping[str, Any], number: int, config: DataConfig
) -> tuple[dict[str, Any], bool | None, list[Unread]]:
    """(message, whether it is marked to be trained, the keys that jaxft does not read)."""
    role, content = given.get("role"), given.get("content")
    if len(given) == 2 and isinstance(role, str) and isinstance(content, str) and role in PLAIN_ROLES:
        # Most messages are so, and need no closer look.
        if content.strip() and not config.role_names and not config.ignored_names:
            return dict(given), None, []
    # Tables fill absent fields with None; templates test whether a field exists.
    given, ignored = split_ignored(present(given), config, "messages.")
    role_key = next((key for key in ROLE_KEYS if key in given), None)
    if role_key is None:
        raise RowProblem(f"message {number} has no role; its keys are {', '.join(sorted(given)) or 'none'}")
    role, is_call = role_of(given.get(role_key), role_key, number, config)
    what = f"message {number} ({role})"
    given, trained = split_marks(given, f"message {number}", config)
    content_key = next((key for key in CONTENT_KEYS if key in given), "content")
    content = given.get(content_key)
    if is_call and not any(given.get(key) for key in CALL_KEYS):
        given, content = {**given, "tool_calls": content}, None
    thoughts = _thoughts(given, what) if role == "assistant" else {}
    unread = [*ignored, *unread_keys(given, {role_key, content_key, *CALL_KEYS, *thoughts}, "messages", config)]
    message = {key: item for key, item in given.items() if key not in (role_key, content_key, *CALL_KEYS, *thoughts)}
    message = {"role": role, **message, **thoughts}
    if calls := calls_of({**given, "role": role}, number):
        message["tool_calls"] = calls
    if isinstance(content, Mapping) and any(key in content for key in ("type", *CONTENT_KEYS)):
        content = [content]
    if isinstance(content, list):
        content, trained, unread_of_parts = _join_parts(content, what, trained, config)
        unread += unread_of_parts
    elif content is not None:
        content = text_of(content, f"the content of {what}")
    may_be_empty = role in ("system", "developer", "tool", "function") or bool(calls)
    if not may_be_empty and not (content or "").strip():
        raise RowProblem(f"{what} has empty content; remove the message or the row")
    return {**message, "content": content or ""}, trained, unread


def _thoughts(given: Mapping[str, Any], what: str) -> dict[str, str]:
    thoughts = {name: given[name] for name in FIELDS if name in given}
    for name, value in thoughts.items():
        if not isinstance(value, str):
            raise RowProblem(f"{what} has {name} of type {type(value).__name__}; it must be text")
    if len({value.strip() for value in thoughts.values()} - {""}) > 1:
        raise RowProblem(f"{what} has different thoughts in {' and in '.join(thoughts)}: keep one")
    return thoughts


def _join_parts(
    parts: Sequence[Any], what: str, trained: bool | None, config: DataConfig
) -> tuple[str, bool | None, list[Unread]]:
    """(the text of all parts, whether they or their message are marked to be trained, keys that jaxft does not read)"""
    texts, verdicts, unread = [], [trained], list[Unread]()
    for number, part in enumerate(parts, 1):
        of_part = f"part {number} of {what}"
        if isinstance(part, str):
            part = {"text": part}
        if not isinstance(part, Mapping):
            raise RowProblem(f"{of_part} is not text: {sample(part)!r}; only text is trained")
        part, ignored = split_ignored(present(part), config, "messages.content.")
        part, mark = split_marks(part, of_part, config)
        kind = part.get("type", "text")
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise RowProblem(
                f"{of_part} has the type {kind!r}, or no text: {sample(part)!r}; it is not text to train on. "
                "Calls of tools belong into tool_calls, their results into messages with the role tool, "
                "thoughts into reasoning_content"
            )
        texts.append(part["text"])
        verdicts.append(mark)
        unread += ignored
        unread += unread_keys(part, PART_KEYS, "messages.content", config)
    known = {verdict for verdict in verdicts if verdict is not None}
    # A part without a mark is trained, unless its message is marked.
    if len(known) > 1 or (False in known and trained is None and None in verdicts[1:]):
        raise RowProblem(
            f"{what} has parts that are to be trained and parts that are not, or a mark that contradicts theirs; only "
            "whole messages can be left out of training. Give all of its parts the same mark"
        )
    return "".join(texts), next(iter(known), None), unread


def merged(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One message of several of the same role: their texts with a blank line between them, and all of their calls."""
    out = {key: value for message in messages for key, value in message.items()}
    for key in ("content", *FIELDS):
        texts = [message[key] for message in messages if message.get(key, "").strip()]
        if key in out:
            out[key] = "\n\n".join(texts) if len(texts) > 1 else next(iter(texts), "")
    if calls := [call for message in messages for call in message.get("tool_calls", ())]:
        out["tool_calls"] = calls
    return out
