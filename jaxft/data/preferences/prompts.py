"""The prompt of a row of preferences or of a labelled answer, wherever the row has it.

A prompt is text, which the answers continue as it is, or a list of messages.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.config import DataConfig
from jaxft.data.rows.messages import CALLERS
from jaxft.data.rows.questions import Message, question_messages, with_system
from jaxft.data.rows.turn_lists import SPEAKERS, as_list, holds_messages, is_chat
from jaxft.data.rows.values import RowProblem, is_absent, text_of
from jaxft.errors import did_you_mean

SPEECH = re.compile(r"(?:^|\n\n)(Human|Assistant):")
WORD = re.compile(r"\w")
ROLES = {"Human": "user", "Assistant": "assistant"}


class PromptIn(NamedTuple):
    """The prompt of a row, None if it has none, and the columns that were read for it."""

    given: str | list[Message] | None
    columns: Collection[str]


def prompt_in(fields: Mapping[str, Any], config: DataConfig) -> PromptIn:
    """The prompt that a row has in a column of its own, with a system prompt in another column before it.

    It is in `data.prompt_field`; or, if that is left at `prompt`, in `instruction` (an alpaca row) or `question`, which
    are a user's message; or in a list of messages such as `conversations`. Raises RowProblem if it could be several of
    these, if `data.prompt_field` names a column that the row does not have, and for a system prompt before text.
    """
    prompt, columns = _prompt_alone(fields, config)
    if prompt is None or isinstance(prompt, str):
        return PromptIn(prompt, columns)
    prompt, of_system = with_system(fields, prompt, config)
    return PromptIn(prompt, {*columns, *of_system})


def _prompt_alone(fields: Mapping[str, Any], config: DataConfig) -> tuple[str | list[Message] | None, set[str]]:
    if not is_absent(given := fields.get(config.prompt_field)):
        return messages_of(given, config.prompt_field), {config.prompt_field}
    if config.prompt_field != "prompt":
        hint = did_you_mean(config.prompt_field, fields)
        raise RowProblem(
            f"it lacks {config.prompt_field!r}, the column of prompts by data.prompt_field.{hint} Its keys: "
            f"{', '.join(sorted(fields))}."
        )
    turns = config.messages_field or "conversations"
    names = [name for name in ("instruction", "question", turns) if not is_absent(fields.get(name))]
    if len(names) > 1:
        raise RowProblem(
            f"the prompt may be in {' or in '.join(map(repr, names))}. Set data.prompt_field to the one that it is in."
        )
    if not names:
        return None, set()
    (name,) = names
    if name == turns or is_chat(fields[name]):
        return messages_of(fields[name], name), {name}
    return question_messages(fields, name, config)


def messages_of(value: Any, field: str) -> str | list[Message]:
    """A prompt or an answer as text or as messages: lists, single messages, ShareGPT's turns, and transcripts.

    Messages may be JSON text. A transcript is text of the turns `Human:` and `Assistant:`, as in Anthropic's sets. A
    value that is neither text nor messages is text as `text_of` writes it. Raises RowProblem if there is no such text.
    """
    if isinstance(value, str):
        if not holds_messages(value):
            return transcript(value) or value
        value = as_list(value, field)
    if isinstance(value, Mapping) and any(key in value for key in ("content", "value", "tool_calls")):
        value = value if all(isinstance(column, list) for column in value.values()) else [value]
    if value == [] or is_chat(value) or (isinstance(value, list) and isinstance(value[0], Mapping)):
        turns = [{key: item for key, item in turn.items() if item is not None} for turn in as_list(value, field)]
        return [_in_openai_form(turn) for turn in turns]
    return text_of(value, repr(field))


def _in_openai_form(turn: Message) -> Message:
    """A turn of ShareGPT under the keys that messages have, so that turns of both forms compare as equal."""
    speaker = str(turn.get("from", "")).lower()
    if speaker not in SPEAKERS or speaker in CALLERS:
        return turn
    renamed = {"role": SPEAKERS[speaker], **({"content": turn["value"]} if "value" in turn else {})}
    return renamed | {key: item for key, item in turn.items() if key not in ("from", "value")}


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
    # A system prompt from a column of its own is not in the answer's conversation.
    for start in (prompt, prompt[1:] if prompt[0].get("role") == "system" else prompt):
        if start and start == answer[: len(start)] and len(answer) > len(start):
            return answer[len(start) :]
    return answer


def _parting(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The index at which two sequences differ, or at which the shorter one ends."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)
