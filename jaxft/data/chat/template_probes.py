"""Properties of a chat template, determined by rendering small conversations with it."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxft.errors import DataError
from jaxft.files.strict_json import parse_json

# (messages, tools) -> text; raises DataError if the template refuses them.
Render = Callable[..., str]
QUESTION = {"role": "user", "content": "Q"}
CONTENT, NAME, VALUE = "An unmistakable answer", "probing", "unmistakable"


def text_after_answer(render: Render) -> str | None:
    """The text after the content of a last answer; None if the template does not show that."""
    try:
        text = render([QUESTION, {"role": "assistant", "content": CONTENT}])
    except DataError:
        return None  # a template may need more than these two plain messages
    _, content, tail = text.rpartition(CONTENT)
    return tail if content else None


def text_after_call(render: Render) -> str | None:
    """The text after the arguments of a last answer that calls a tool; None if the template shows no call."""
    for as_text in (False, True):
        text = _call(render, as_text)
        if text is not None and VALUE in text:
            return text.rpartition(VALUE)[2]
    return None


def wants_text(render: Render) -> bool:
    """Whether the arguments of tool calls must be JSON text for this template.

    Most templates convert an object to JSON themselves, and would put quotes around text. Some concatenate strings,
    and fail on an object or print it as Python does.
    """
    given = _call(render, as_text=False)
    if given is not None and f"'{NAME}': " not in given:
        return False
    written = _call(render, as_text=True)
    return written is not None and f'"{NAME}"' in written


def wants_short_ids(render: Render) -> bool:
    """Whether a template refuses calls with the ids that OpenAI gives, and takes those of nine letters and digits."""
    return any(
        _call(render, as_text) is not None and _call(render, as_text, call_id=f"call_{'x' * 24}") is None
        for as_text in (False, True)
    )


def writes_python(render: Render) -> bool:
    """Whether a template writes true, false and null of a call's arguments as Python does: True, False, None."""
    text, usual = (_call(render, as_text=False, value=value) for value in (True, VALUE))
    return text is not None and usual is not None and text.count("True") > usual.count("True")


def with_arguments(messages: Sequence[Mapping[str, Any]], *, as_text: bool) -> list[dict[str, Any]]:
    """The messages with the arguments of every tool call as objects, or as JSON text.

    Raises DataError for text that is not JSON.
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
            function["arguments"] = parse_json(arguments)
        except ValueError as error:
            raise DataError(f"the arguments of a call of {function.get('name')!r} are not JSON: {error}") from error
    return {**call, "function": function} if function else dict(call)


def _call(render: Render, as_text: bool, call_id: str = "abcdefghi", value: str | bool = VALUE) -> str | None:
    # Nine letters: Mistral's templates refuse any other id.
    call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": {NAME: value}}}
    properties = {NAME: {"type": "string", "description": "p"}}
    parameters = {"type": "object", "properties": properties, "required": [NAME]}
    tool = {"type": "function", "function": {"name": "f", "description": "f", "parameters": parameters}}
    messages: list[Mapping[str, Any]] = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        return render(with_arguments(messages, as_text=as_text), tools=[tool])
    except DataError:
        return None
