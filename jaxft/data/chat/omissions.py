"""Parts of a row that a chat template silently omits, so that training would see less than the row contains."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxft.data.chat.reasoning import CLOSE, thoughts_of

MENDS = {
    "the thoughts": "data.reasoning='inline' writes them into the content as a <think> block, 'drop' trains without "
    "them; or set data.chat_template to one that shows them",
}
MEND = "Set data.chat_template to one that shows it"


class Shown:
    """Where texts were in the last prompt that was searched. The next one is mostly longer, and has them there too."""

    def __init__(self) -> None:
        self._at: dict[str, int] = {}

    def __call__(self, text: str, prompt: str) -> bool:
        """Whether the prompt contains the text."""
        at = self._at.get(text, -1)
        if at < 0 or not prompt.startswith(text, at):
            at = self._at[text] = prompt.find(text)
        return at >= 0


def omissions(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    index: int,
    prompt: str,
    answer: str,
    shown: Shown,
) -> Iterator[tuple[str, int]]:
    """(omitted part, number of its message or 0) for one answer.

    messages: of the conversation; index: of the answer. prompt: the rendered text before the answer; answer: the
    rendered answer up to its end. shown: of the conversation, kept from one answer to the next.
    """
    if any(not shown(tool["function"]["name"], prompt) for tool in tools):
        yield "the tools", 0
    for number, earlier in enumerate(messages[:index], 1):
        if earlier["role"] in ("system", "developer") and not shown(earlier["content"].strip(), prompt):
            yield "the system message", number
        if earlier["role"] in ("tool", "function") and not _is_written(earlier["content"], prompt, shown):
            yield "the tool's result", number
    message = messages[index]
    if thoughts_of(message) not in answer:
        yield "the thoughts", index + 1
    if message["content"].rpartition(CLOSE)[2].strip() not in answer:
        yield "the text", index + 1
    for call in message.get("tool_calls", ()):
        function = call["function"]
        if any(name not in answer for name in (function["name"], *function["arguments"])):
            yield "the tool call", index + 1


def _is_written(content: str, prompt: str, shown: Shown) -> bool:
    """Whether a prompt contains the content, as it is or as JSON spells it."""
    content = content.strip()
    if shown(content, prompt):
        return True
    return any(shown(json.dumps(content, ensure_ascii=ascii)[1:-1], prompt) for ascii in (True, False))
