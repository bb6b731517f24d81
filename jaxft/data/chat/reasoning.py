"""Thoughts before an answer: `<think>` blocks in the content, or a field beside it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

OPEN, CLOSE = "<think>", "</think>"
# Names under which rows, servers and templates keep thoughts; the first is the commonest.
FIELDS = ("reasoning_content", "thinking", "reasoning")


def split_thoughts(content: str) -> tuple[str, str]:
    """(thoughts, the rest), without white space around; content without thoughts stays as it is.

    Where the opening tag is absent, because the prompt held it, everything before the closing one is thought.
    """
    head, closed, rest = content.rpartition(CLOSE)
    if not closed:
        return "", content
    before, _, thoughts = head.rpartition(OPEN) if OPEN in head else ("", "", head)
    return thoughts.strip(), f"{before.strip()}\n{rest.strip()}".strip()


def thoughts_of(message: Mapping[str, Any]) -> str:
    """The thoughts of an assistant message, whichever way it holds them; empty where there are none."""
    beside = next((message[name] for name in FIELDS if message.get(name)), "")
    return beside.strip() or split_thoughts(message["content"])[0]


def arranged(messages: Sequence[Mapping[str, Any]], how: str, template: str | None) -> tuple[dict[str, Any], ...]:
    """The messages with their thoughts where `data.reasoning` wants them.

    how: `keep` (a field is called as the template calls it, else nothing changes), `inline` (a field becomes a
    `<think>` block at the start of the content), `drop` (no field, no block). Thoughts are the assistant's alone.
    """
    return tuple(_arranged(dict(m), how, template) if m["role"] == "assistant" else dict(m) for m in messages)


def _arranged(message: dict[str, Any], how: str, template: str | None) -> dict[str, Any]:
    held = [name for name in FIELDS if name in message]
    if how == "drop":
        rest = {k: v for k, v in message.items() if k not in FIELDS}
        return rest | {"content": split_thoughts(message["content"])[1]}
    if not held:
        return message
    thoughts = next((message[name] for name in held if message[name]), "")
    rest = {k: v for k, v in message.items() if k not in FIELDS}
    if how == "inline":
        block = f"{OPEN}\n{thoughts.strip()}\n{CLOSE}\n\n" if thoughts.strip() else ""
        return rest | {"content": block + message["content"]}
    return rest | {_field_of(template) or held[0]: thoughts}


def _field_of(template: str | None) -> str | None:
    """The field that a template reads thoughts from: `message.thinking` or `message['thinking']`."""
    read = (name for name in FIELDS if re.search(rf"(\.|\[['\"]|get\(['\"]){name}\b", template or ""))
    return next(read, None)
