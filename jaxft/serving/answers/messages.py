"""The messages of a chat in the form in which a chat template reads them."""

from collections.abc import Mapping
from typing import Any

from jaxft.files.strict_json import parse_json
from jaxft.serving.http.bodies import SHOWN, refuse_unknown, text_field
from jaxft.serving.http.errors import ApiError, bad_request

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_MESSAGES, MOST_CALLS, MOST_CHARACTERS = 4096, 128, 4 * 2**20
NAME_CHARACTERS, ID_CHARACTERS = 64, 200
OF_ALL = ("role", "content", "name")
# What the SDK's own objects have when an answer is sent back; empty, or about the answer and no part of it.
OF_ASSISTANT = (*OF_ALL, "tool_calls", "reasoning_content", "refusal", "annotations", "audio", "function_call")
OF_TOOL = (*OF_ALL, "tool_call_id")


def parse_messages(value: Any) -> tuple[dict[str, Any], ...]:
    """The messages. Raises ApiError 400 for what is no list of messages, with the number of the message."""
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        raise bad_request(f"messages must be a list of 1 to {MOST_MESSAGES:,} messages.", "messages")
    return tuple(_message(one, f"messages[{number}].") for number, one in enumerate(value))


def _message(given: Any, within: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise bad_request(f"{within[:-1]} must be an object with role and content.", within[:-1])
    role = given.get("role")
    if role not in ROLES:
        hint = " Give tools, and the role tool." if role == "function" else ""
        raise bad_request(f"{within}role must be one of {', '.join(ROLES)}.{hint}", f"{within}role")
    names = {"assistant": OF_ASSISTANT, "tool": OF_TOOL}.get(role, OF_ALL)
    refuse_unknown(given, names, within)
    for name in ("refusal", "audio", "function_call", "annotations"):
        if given.get(name):
            raise bad_request(f"{within}{name} is not served: leave it out.", f"{within}{name}")
    message: dict[str, Any] = {"role": role, "content": _content(given, role, within)}
    if (speaker := text_field(given, "name", most=NAME_CHARACTERS, within=within)) is not None:
        message["name"] = speaker
    if role == "assistant":
        calls = _calls(given.get("tool_calls"), within)
        thoughts = text_field(given, "reasoning_content", most=MOST_CHARACTERS, within=within)
        message |= ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": thoughts} if thoughts else {})
    if role == "tool":
        id = text_field(given, "tool_call_id", required=True, most=ID_CHARACTERS, within=within)
        message["tool_call_id"] = id
    return message


def _content(given: Mapping[str, Any], role: str, within: str) -> str:
    """The text; parts of a text are put together."""
    content = given.get("content")
    if content is None:
        if role == "assistant":
            return ""
        raise bad_request(f"{within}content is missing.", f"{within}content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise bad_request(f"{within}content must be a text, or a list of text parts.", f"{within}content")
    return "".join(_part(part, f"{within}content[{number}]") for number, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, Mapping) else None
        shown = f" It is {str(kind)[:SHOWN]!r}: this server answers texts." if kind not in (None, "text") else ""
        raise bad_request(f"{where} must be a part of the type text.{shown}", where)
    return str(part["text"])


def _calls(value: Any, within: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MOST_CALLS:
        raise bad_request(
            f"{within}tool_calls must be a list of at most {MOST_CALLS} calls of functions.", f"{within}tool_calls"
        )
    return [_call(one, f"{within}tool_calls[{number}]") for number, one in enumerate(value)]


def _call(given: Any, where: str) -> dict[str, Any]:
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or given.get("type", "function") != "function":
        raise bad_request(f"{where} must be a call of a function.", where)
    name, arguments, id = function.get("name"), function.get("arguments"), given.get("id")
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise bad_request(f"{where}.function must have a name, and arguments as JSON text.", where)
    if not isinstance(id, str) or len(id) > ID_CHARACTERS:
        raise bad_request(f"{where}.id must be a text of at most {ID_CHARACTERS} characters.", where)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": _arguments(arguments, where)}}


def _arguments(text: str, where: str) -> dict[str, Any]:
    """The arguments as the rows of training have them."""
    try:
        value = parse_json(text) if text.strip() else {}
    except ValueError as error:
        raise _not_json(where, str(error)) from error
    if not isinstance(value, dict):
        raise _not_json(where, "it is no object")
    return value


def _not_json(where: str, why: str) -> ApiError:
    return bad_request(f"{where}.function.arguments must be a JSON object as text: {why[:200]}.", where)
