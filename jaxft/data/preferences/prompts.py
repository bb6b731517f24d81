"""The prompt of a row of preferences or of a labelled answer, wherever the row has it.

A prompt is text, which the answers continue as it is, or a list of messages.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.config import DataConfig
from jaxft.data.formats import RowProblem, alpaca_prompt, as_list, sharegpt_message, sharegpt_messages
from jaxft.errors import did_you_mean

Message = dict[str, Any]
SPEECH = re.compile(r"(?:^|\n\n)(Human|Assistant):")
WORD = re.compile(r"\w")
ROLES = {"Human": "user", "Assistant": "assistant"}


def prompt_in(fields: Mapping[str, Any], config: DataConfig) -> str | list[Message] | None:
    """The prompt that a row has in a column of its own; None if it has none.

    It is in `data.prompt_field`; or, if that is left at `prompt`, in `instruction` (an alpaca row) or `question`, which
    are a user's message, with `system` before it; or in `conversations` (ShareGPT). Raises RowProblem if it could be
    several of these, or if `data.prompt_field` names a column that the row does not have.
    """
    if (given := fields.get(config.prompt_field)) is not None:
        return messages_of(given, config.prompt_field)
    if config.prompt_field != "prompt":
        hint = did_you_mean(config.prompt_field, fields)
        raise RowProblem(
            f"it lacks {config.prompt_field!r}, the column of prompts by data.prompt_field.{hint} Its keys: "
            f"{', '.join(sorted(fields))}."
        )
    names = [name for name in ("instruction", "question", "conversations") if fields.get(name) is not None]
    if len(names) > 1:
        raise RowProblem(
            f"the prompt may be in {' or in '.join(map(repr, names))}. Set data.prompt_field to the one that it is in."
        )
    if not names:
        return None
    (name,) = names
    if name == "conversations":
        return sharegpt_messages(fields)
    if not isinstance(fields[name], str):
        return messages_of(fields[name], name)
    return alpaca_prompt(
        fields if name == "instruction" else {"system": fields.get("system"), "instruction": fields[name]}
    )


def messages_of(value: Any, field: str) -> str | list[Message]:
    """A prompt or an answer as text or as messages: lists, single messages, ShareGPT's turns, and transcripts.

    A transcript is text of the turns `Human:` and `Assistant:`, as in Anthropic's sets. Raises RowProblem if it is
    none of these.
    """
    if isinstance(value, str):
        return transcript(value) or value
    if isinstance(value, Mapping) and ("content" in value or "value" in value or "tool_calls" in value):
        value = [value]
    turns = [{key: item for key, item in turn.items() if item is not None} for turn in as_list(value, field)]
    return [sharegpt_message(turn, number) if "from" in turn else turn for number, turn in enumerate(turns, 1)]


def transcript(text: str) -> list[Message] | None:
    r"""The messages of a text such as `\n\nHuman: Hi\n\nAssistant: Hello`; None if it is none.

    A last `Assistant:` with nothing after it asks for the answer, and is no message.
    """
    speeches = list(SPEECH.finditer(text))
    if len(speeches) < 2 or speeches[0].start() != 0 or speeches[0][1] != "Human":
        return None
    ends = [speech.start() for speech in speeches[1:]] + [len(text)]
    messages = [
        {"role": ROLES[speech[1]], "content": text[speech.end() : end].strip()}
        for speech, end in zip(speeches, ends, strict=True)
    ]
    return messages[:-1] if speeches[-1][1] == "Assistant" and not messages[-1]["content"] else messages


def shared_prompt(
    chosen: str | list[Message], rejected: str | list[Message]
) -> tuple[str | list[Message], str | list[Message], str | list[Message]]:
    """(prompt, chosen, rejected) of two texts, or two conversations, that begin with the same prompt.

    The prompt is the longest beginning of messages that both share. Of texts it is the longest shared beginning up to
    the word in which they part, without the space before it: TRL's `extract_prompt`, which may part within a word.
    Raises RowProblem if nothing is shared, if one begins with the whole of the other, if conversations part at another
    message than an answer, or if one is text and the other is not.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        at = _parting(chosen, rejected)
        while at and WORD.match(chosen[at - 1]) and (WORD.match(chosen, at) or WORD.match(rejected, at)):
            at -= 1
        at -= at > 0 and chosen[at - 1] == " "
        if not chosen[:at].strip():
            raise RowProblem(
                "the texts of both answers share no beginning, so there is no prompt. Set data.prompt_field to the "
                "column of prompts."
            )
    elif isinstance(chosen, str) or isinstance(rejected, str):
        raise RowProblem("one answer is text and the other is a list of messages: both must be text, or both messages")
    else:
        at = _parting(chosen, rejected)
        if not at:
            raise RowProblem(
                "the conversations of both answers share no first message, so there is no prompt. Set "
                "data.prompt_field to the column of prompts."
            )
    rest = chosen[at:], rejected[at:]
    if not all(rest):
        raise RowProblem("one answer begins with the whole of the other, so that nothing of it would be trained")
    for messages in rest:
        if not isinstance(messages, str) and messages[0].get("role") != "assistant":
            raise RowProblem(
                f"the conversations of both answers part at a message of {messages[0].get('role')!r}, so their prompts "
                "differ. They must share all messages before an answer."
            )
    return chosen[:at], *rest


def answer_to(prompt: str | list[Message], answer: str | list[Message]) -> str | list[Message]:
    """An answer in the form that its prompt has.

    After messages, text becomes an assistant's message, without white space before it. A whole conversation that
    begins with the prompt loses it.
    """
    if isinstance(prompt, str):
        return answer
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer.lstrip()}]
    count = len(prompt)
    return answer[count:] if prompt == answer[:count] and len(answer) > count else answer


def _parting(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The index at which two sequences differ, or at which the shorter one ends."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)
