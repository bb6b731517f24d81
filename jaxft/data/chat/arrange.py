"""Messages of a row as a chat template can render them: its roles, its turns, and the field of its thoughts."""

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxft.config import DataConfig
from jaxft.data.chat.reasoning import arrange_thoughts
from jaxft.data.chat.tool_calls import with_json_values, with_short_ids
from jaxft.data.formats import Conversation
from jaxft.data.rows.messages import merged
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError

# The notes of rows whose messages are changed, as warnings tell them.
DEVELOPER = "the developer's message is given to the chat template as the system message, the only one that it knows"
MERGED = "consecutive messages of the same role are joined (data.merge_turns)"
SHORT_IDS = "the ids of tool calls are replaced by ids of nine letters, the only ones that the chat template takes"
JSON_VALUES = (
    "true, false and null among the arguments of tool calls are given to the chat template as text, since it would "
    "write them as Python does"
)
CHANGES = (DEVELOPER, MERGED, SHORT_IDS, JSON_VALUES)
NAME = re.compile(r"[A-Za-z_]\w*$")


def arrange(conversation: Conversation, tokenizer: Tokenizer, config: DataConfig, notes: Counter[str]) -> Conversation:
    """The conversation with its messages as the template reads them.

    A developer is the system if the template knows no developer; turns are joined by data.merge_turns; documents stay
    if the template reads them; tool calls have ids that the template takes; thoughts are where data.reasoning says.
    notes: counts the rows that were changed. Raises DataError, naming the row, if joined messages would be trained in
    part.
    """
    if not conversation.messages:
        return conversation
    if any(message["role"] == "developer" for message in conversation.messages):
        renamed = with_known_roles(conversation.messages, tokenizer)
        notes[DEVELOPER] += renamed != conversation.messages
        conversation = replace(conversation, messages=renamed)
    if config.merge_turns:
        conversation = _merge(conversation, notes)
    if "documents" in conversation.template_kwargs and "documents" not in tokenizer.template_variables:
        # They are counted as unread, which is refused or ignored by a setting.
        kwargs = {name: value for name, value in conversation.template_kwargs.items() if name != "documents"}
        conversation = replace(conversation, template_kwargs=kwargs)
    if any(message.get("tool_calls") for message in conversation.messages):
        conversation = _with_calls(conversation, tokenizer, notes)
    messages = arrange_thoughts(conversation.messages, config.reasoning, tokenizer.chat_template)
    return replace(conversation, messages=messages)


def _with_calls(conversation: Conversation, tokenizer: Tokenizer, notes: Counter[str]) -> Conversation:
    messages = conversation.messages
    if tokenizer.wants_short_ids:
        messages = tuple(with_short_ids(messages))
        notes[SHORT_IDS] += messages != conversation.messages
    if tokenizer.writes_python_values:
        written = tuple(with_json_values(messages))
        notes[JSON_VALUES] += written != messages
        messages = written
    return replace(conversation, messages=messages)


def with_known_roles(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> tuple[dict[str, Any], ...]:
    """The messages, those of a developer as the system's if the template knows a system and no developer."""
    names = names_in(tokenizer.chat_template)
    renames = "developer" not in names and "system" in names
    return tuple(
        {**message, "role": "system"} if renames and message.get("role") == "developer" else dict(message)
        for message in messages
    )


def _merge(conversation: Conversation, notes: Counter[str]) -> Conversation:
    messages = conversation.messages
    runs: list[list[int]] = []
    for index, message in enumerate(messages):
        joins = (
            runs and message["role"] == messages[runs[-1][0]]["role"] and message["role"] not in ("tool", "function")
        )
        if joins:
            runs[-1].append(index)
        else:
            runs.append([index])
    if len(runs) == len(messages):
        return conversation
    notes[MERGED] += 1
    untrained, first_trained = set(), len(runs)
    for number, run in enumerate(runs):
        trained = {index >= conversation.first_trained and index not in conversation.untrained for index in run}
        if len(trained) > 1 and messages[run[0]]["role"] == "assistant":
            raise DataError(
                f"{conversation.where}: messages {run[0] + 1} to {run[-1] + 1} are answers in a row, of which some are "
                "trained and some are not, so data.merge_turns cannot join them. Give them the same mark, or a message "
                "between them."
            )
        if run[-1] >= conversation.first_trained:
            first_trained = min(first_trained, number)
        if any(index in conversation.untrained for index in run):
            untrained.add(number)
    joined = tuple(merged([messages[index] for index in run]) for run in runs)
    return replace(conversation, messages=joined, first_trained=first_trained, untrained=frozenset(untrained))


@functools.lru_cache(maxsize=16)
def names_in(template: str | None) -> frozenset[str]:
    """All names that a template mentions: variables, fields, and short texts such as the names of roles and keys."""
    from jinja2 import Environment, TemplateError

    try:
        tokens = list(Environment().lex(template or ""))
    except TemplateError:
        return frozenset(re.findall(r"[A-Za-z_]\w*", template or ""))  # rendering it will say what is wrong
    named = (text.strip("'\"") for _, kind, text in tokens if kind in ("name", "string"))
    return frozenset(text for text in named if NAME.match(text))


def names_of(tokenizer: Tokenizer) -> frozenset[str]:
    """All names that the chat templates of a tokenizer mention."""
    templates: Sequence[Any] = list(tokenizer.chat_templates.values())
    return frozenset().union(*(names_in(template) for template in templates))
