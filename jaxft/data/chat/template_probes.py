"""What a chat template does, found by rendering little conversations with it."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxft.errors import DataError

# (messages, tools) -> text; raises DataError where the template refuses them.
Render = Callable[..., str]
QUESTION = {"role": "user", "content": "Q"}
CONTENT, NAME, VALUE = "An unmistakable answer", "probing", "unmistakable"


def text_after_answer(render: Render) -> str | None:
    """What stands after the content of a last answer; None where the template says nothing about it."""
    try:
        text = render([QUESTION, {"role": "assistant", "content": CONTENT}])
    except DataError:
        return None  # a template that wants more than two plain messages says nothing here
    _, found, tail = text.rpartition(CONTENT)
    return tail if found else None


def text_after_call(render: Render) -> str | None:
    """What stands after the arguments of a last answer that calls a tool; None where the template shows no call."""
    for as_text in (False, True):
        text = _call(render, as_text)
        if text is not None and VALUE in text:
            return text.rpartition(VALUE)[2]
    return None


def wants_text(render: Render) -> bool:
    """Whether a template writes the arguments of a tool call as they come, so that they must be JSON text.

    Most print an object themselves; given text they would quote it. Some put together strings, and fail on an object
    or print it as Python does.
    """
    given = _call(render, as_text=False)
    if given is not None and f"'{NAME}': " not in given:
        return False
    written = _call(render, as_text=True)
    return written is not None and f'"{NAME}"' in written


def with_arguments(messages: Sequence[Mapping[str, Any]], *, as_text: bool) -> list[dict[str, Any]]:
    """The messages with the arguments of every tool call as objects, or as JSON text.

    Raises DataError where text is no JSON.
    """
    return [
        {**m, "tool_calls": [_with_arguments(call, as_text) for call in m["tool_calls"]]}
        if m.get("tool_calls")
        else dict(m)
        for m in messages
    ]


def _with_arguments(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if as_text and arguments is not None and not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    if not as_text and isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments)
        except ValueError as error:
            raise DataError(f"the arguments of a call of {function.get('name')!r} are not JSON: {error}") from error
    return {**call, "function": function} if function else dict(call)


def _call(render: Render, as_text: bool) -> str | None:
    # Nine letters: Mistral's templates take no other id.
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {NAME: VALUE}}}
    properties = {NAME: {"type": "string", "description": "p"}}
    parameters = {"type": "object", "properties": properties, "required": [NAME]}
    tool = {"type": "function", "function": {"name": "f", "description": "f", "parameters": parameters}}
    messages = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        return render(with_arguments(messages, as_text=as_text), tools=[tool])
    except DataError:
        return None
