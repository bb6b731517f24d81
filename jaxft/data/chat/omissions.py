"""What a chat template leaves out of a row without a word: the model would be trained on less than the row says."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxft.data.chat.reasoning import CLOSE, thoughts_of

MENDS = {
    "the thoughts": "data.reasoning='inline' writes them into the content as a <think> block, 'drop' trains without; "
    "or set data.chat_template to one that shows them",
}
MEND = "Set data.chat_template to one that shows it"


def omissions(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], index: int, prompt: str, answer: str
) -> Iterator[tuple[str, int]]:
    """(what is absent, number of its message or 0) for one answer, as the template writes it where it is asked for.

    messages: of the conversation; index: of the answer. prompt: text before the answer; answer: from there to its end.
    """
    if any(tool["function"]["name"] not in prompt for tool in tools):
        yield "the tools", 0
    for number, message in enumerate(messages[:index], 1):
        if message["role"] in ("system", "developer") and message["content"].strip() not in prompt:
            yield "the system message", number
        if message["role"] in ("tool", "function") and not _written(message["content"], prompt):
            yield "the tool's result", number
    asked = messages[index]
    if thoughts_of(asked) not in answer:
        yield "the thoughts", index + 1
    if asked["content"].rpartition(CLOSE)[2].strip() not in answer:
        yield "the text", index + 1
    for call in asked.get("tool_calls", ()):
        function = call["function"]
        if any(name not in answer for name in (function["name"], *function["arguments"])):
            yield "the tool call", index + 1


def _written(content: str, text: str) -> bool:
    """Whether a text holds the content as it is or as JSON spells it."""
    content = content.strip()
    spellings = (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1])
    return any(spelling in text for spelling in spellings)
