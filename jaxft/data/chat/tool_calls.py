"""Tools and tool calls in one form, OpenAI's, from the various forms that rows have."""

import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.files.strict_json import parse_json


class BadCall(ValueError):
    """A problem with a tool or a call; the reader of the row adds the row's name."""


def calls_of(message: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    """The tool calls of a message, each `{"type": "function", "function": {"name", "arguments"}}` and its id if any.

    `tool_calls` is a list of calls, or one call, or JSON text of either; a call may lack the outer object, and its
    arguments may be JSON text. `function_call` is the single call of OpenAI's older form. number: of the message, for
    errors. Raises BadCall.
    """
    given = message.get("tool_calls")
    if message.get("function_call"):
        given = given or [message["function_call"]]
    if not given:
        return []
    given = _parse(given, number)
    if isinstance(given, Mapping) and all(isinstance(column, list) for column in given.values()):
        # Columnar stores return a list of objects as an object of lists.
        given = [dict(zip(given, items, strict=True)) for items in zip(*given.values(), strict=True)]
    calls = [given] if isinstance(given, Mapping) else given
    if not isinstance(calls, list):
        raise BadCall(f"message {number} calls a tool with {str(given)[:60]!r}, not an object")
    if message.get("role") != "assistant":
        raise BadCall(f"message {number} ({message.get('role')}) calls a tool, which only the assistant does")
    return [_call(call, number) for call in calls]


def tools_of(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The JSON schemas in a row's `tools`: a list, or JSON text of one; the outer `{"type": "function"}` is optional.

    Raises BadCall.
    """
    tools = row.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = parse_json(tools, whole_characters=False) if tools.strip() else []
        except ValueError as error:
            raise BadCall(f"'tools' is text but not JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadCall(f"'tools' must be a list of JSON schemas; it is {str(tools)[:60]!r}")
    return tuple(_tool(tool) for tool in tools)


def with_json_values(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with true, false and null among the arguments of tool calls as the text that JSON has for them."""

    def spelt(call: Mapping[str, Any]) -> dict[str, Any]:
        arguments = call["function"].get("arguments")
        if not isinstance(arguments, Mapping):
            return dict(call)
        own = {k: json.dumps(v) if v is None or isinstance(v, bool) else v for k, v in arguments.items()}
        return {**call, "function": {**call["function"], "arguments": own}}

    return [
        {**message, "tool_calls": [spelt(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def with_short_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with ids of nine letters and digits in tool calls and their results.

    Such ids stay; others become the same short one wherever they stand, and calls without an id get one. A result
    without an id is that of the next call that has none yet.
    """
    out: list[dict[str, Any]] = []
    waiting: list[str] = []  # ids of calls without a result
    for index, message in enumerate(messages):
        if message.get("tool_calls"):
            calls = [
                {**call, "id": _short(str(call.get("id") or f"{index}.{number}"))}
                for number, call in enumerate(message["tool_calls"])
            ]
            waiting = [call["id"] for call in calls]
            out.append({**message, "tool_calls": calls})
        elif message.get("role") in ("tool", "function"):
            given = message.get("tool_call_id") or message.get("id")
            short = _short(str(given)) if given else waiting[0] if waiting else _short(str(index))
            waiting = [one for one in waiting if one != short]
            out.append({**message, "tool_call_id": short})
        else:
            out.append(dict(message))
    return out


def _short(call_id: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9]{9}", call_id):
        return call_id
    number = int.from_bytes(hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).digest()[:8])
    letters = string.digits + string.ascii_letters
    return "".join(letters[number // len(letters) ** digit % len(letters)] for digit in range(9))


def _call(call: Any, number: int) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise BadCall(f"message {number} has a tool call that is not an object: {str(call)[:60]!r}")
    inner = call.get("function")
    function = dict(inner) if isinstance(inner, Mapping) else {k: v for k, v in call.items() if k not in ("id", "type")}
    if not isinstance(function.get("name"), str):
        raise BadCall(f"message {number} has a tool call without the name of a function: {str(dict(call))[:60]!r}")
    arguments = function.get("arguments")
    arguments = {} if arguments is None or arguments == "" else _parse(arguments, number)
    if not isinstance(arguments, Mapping):
        raise BadCall(f"message {number} calls a tool with {str(arguments)[:60]!r}, not an object")
    outer = {k: v for k, v in call.items() if k in ("id", "index")}
    return {**outer, "type": "function", "function": {**function, "arguments": dict(arguments)}}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    bare = not isinstance(tool.get("function"), Mapping)
    wrapped: dict[str, Any] = {"type": "function", "function": dict(tool)} if bare else dict(tool)
    if not isinstance(wrapped["function"].get("name"), str):
        raise BadCall(f"a tool has no name: {str(dict(tool))[:60]!r}")
    return wrapped


def _parse(value: Any, number: int) -> Any:
    try:
        return parse_json(value, whole_characters=False) if isinstance(value, str) else value
    except ValueError as error:
        raise BadCall(f"message {number} calls a tool with something that is not JSON: {error}") from error
