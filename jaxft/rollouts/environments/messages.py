"""Messages of the environments that ship with jaxft. It needs no other library, so that their processes start fast."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")
SYSTEM = ("system", "developer")


def with_instructions(prompt: str | Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """The messages of a row's prompt with instructions: at the end of its system message, or before the first one.

    They become no system message of their own, which some chat templates refuse.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": f"{text}\n\n{prompt}"}]
    first, *rest = (dict(message) for message in prompt)
    own = str(first.get("content", ""))
    first["content"] = f"{own}\n\n{text}" if first.get("role") in SYSTEM else f"{text}\n\n{own}"
    return [first, *rest]


def without_thoughts(text: str) -> str:
    """The text after the last `</think>`."""
    return text.rpartition("</think>")[2]


def last_number(text: str) -> float | None:
    """The last number in a text, such as -1,234.5; None if there is none."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
