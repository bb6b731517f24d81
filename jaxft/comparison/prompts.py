"""Prompts of a comparison: a question after k examples, under its own system message or another one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxft.comparison.rows import Row
from jaxft.data import Conversation, Tokenizer
from jaxft.data.chat.arrange import arrange
from jaxft.data.chat.encode import prompt_of
from jaxft.data.chat.turns import trained_answers
from jaxft.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class SystemPrompt:
    """Another system message. name: in results. text: None: the rows' own; empty: none at all."""

    name: str
    text: str | None


OWN = SystemPrompt(name="", text=None)
BARE = SystemPrompt(name="bare", text="")


def conversation_with(row: Row, examples: Sequence[Row], system: SystemPrompt = OWN) -> Conversation:
    """The question of a row with examples as earlier turns; of plain text, as text before it.

    Examples keep their turns and lose their system messages. Raises ConfigError for a system message before plain text.
    """
    own = row.conversation
    if not own.messages:
        if system.text is not None:
            raise ConfigError(
                f"{row.name} is a plain prompt, which has no room for the system message {system.name!r}: leave "
                "--prompts out, or write the rows as messages"
            )
        before = "".join(f"{one.conversation.prompt}{one.conversation.completion}\n\n" for one in examples)
        return replace(own, prompt=before + own.prompt)
    head: tuple[Any, ...] = row.system
    if system.text is not None:
        head = ({"role": "system", "content": system.text},) if system.text else ()
    turns = tuple(turn for one in examples for turn in one.conversation.messages[len(one.system) :])
    moved = len(head) + len(turns) - len(row.system)
    return replace(
        own,
        messages=(*head, *turns, *own.messages[len(row.system) :]),
        first_trained=own.first_trained + moved,
        untrained=frozenset(index + moved for index in own.untrained),
    )


def prompt_tokens(
    tokenizer: Tokenizer, row: Row, examples: Sequence[Row], system: SystemPrompt = OWN
) -> tuple[list[int], str]:
    """(token ids of the prompt, the reference). Raises DataError for examples that the chat template refuses."""
    return prompt_of(conversation_with(row, examples, system), tokenizer, row.data)


def prompt_messages(
    tokenizer: Tokenizer, row: Row, examples: Sequence[Row], system: SystemPrompt = OWN
) -> list[dict[str, Any]]:
    """The prompt as messages for an endpoint, which renders them itself; a plain prompt is a message of the user."""
    conversation = conversation_with(row, examples, system)
    if not conversation.messages:
        return [{"role": "user", "content": conversation.prompt}]
    from collections import Counter

    config = replace(row.data, train_on="last")
    arranged = arrange(conversation, tokenizer, config, Counter())
    last = (trained_answers(arranged, "last") or [0])[0]
    if last == 0:
        raise DataError(f"{row.name}: the answer is the first message, so it has no prompt")
    return [{"role": one["role"], "content": one["content"]} for one in arranged.messages[:last]]


def check_room(prompts: Sequence[Sequence[int]], names: Sequence[str], room: int, k: int) -> str | None:
    """Why k examples do not fit: the row whose prompt would be cut; None if all fit. room: for a prompt, in tokens."""
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    if len(prompts[longest]) <= room:
        return None
    return (
        f"{k} examples would cut a row: {names[longest]} has a prompt of {len(prompts[longest]):,} tokens, and "
        f"{room:,} fit beside the answer"
    )
