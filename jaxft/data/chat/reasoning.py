"""Thoughts before an answer: `<think>` blocks in the content, or a field of their own."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

OPEN, CLOSE = "<think>", "</think>"
# Field names for thoughts in rows, servers and templates; the first is the most common.
FIELDS = ("reasoning_content", "thinking", "reasoning")


def split_thoughts(content: str) -> tuple[str, str]:
    """(thoughts, the rest), both stripped; content without thoughts is unchanged.

    If the opening tag is absent, because it was in the prompt, everything before the closing tag is thoughts.
    """
    head, closed, rest = content.rpartition(CLOSE)
    if not closed:
        return "", content
    before, _, thoughts = head.rpartition(OPEN) if OPEN in head else ("", "", head)
    return thoughts.strip(), f"{before.strip()}\n{rest.strip()}".strip()


def thoughts_of(message: Mapping[str, Any]) -> str:
    """The thoughts of an assistant message, from a field or its content; empty if it has none."""
    from_field = next((message[name] for name in FIELDS if message.get(name)), "")
    return from_field.strip() or split_thoughts(message["content"])[0]


def arrange_thoughts(
    messages: Sequence[Mapping[str, Any]], how: str, template: str | None
) -> tuple[dict[str, Any], ...]:
    """The messages with the assistant's thoughts arranged as `data.reasoning` says.

    how: `keep` (a field gets the name that the template reads; nothing else changes), `inline` (a field becomes a
    `<think>` block at the start of the content), `drop` (fields and blocks are removed). template: Jinja text.
    """
    return tuple(_arrange(dict(m), how, template) if m["role"] == "assistant" else dict(m) for m in messages)


def _arrange(message: dict[str, Any], how: str, template: str | None) -> dict[str, Any]:
    fields = [name for name in FIELDS if name in message]
    if how == "drop":
        rest = {k: v for k, v in message.items() if k not in FIELDS}
        return rest | {"content": split_thoughts(message["content"])[1]}
    if not fields:
        return message
    thoughts = next((message[name] for name in fields if message[name]), "")
    rest = {k: v for k, v in message.items() if k not in FIELDS}
    if how == "inline":
        block = f"{OPEN}\n{thoughts.strip()}\n{CLOSE}\n\n" if thoughts.strip() else ""
        return rest | {"content": block + message["content"]}
    return rest | {field_of(template) or fields[0]: thoughts}


def field_of(template: str | None) -> str | None:
    """The field from which a template reads thoughts: `message.thinking` or `message['thinking']`."""
    read = (name for name in FIELDS if re.search(rf"(\.|\[['\"]|get\(['\"]){name}\b", template or ""))
    return next(read, None)
