"""Readers of the common forms of preferences: each row becomes the pairs that it has."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxft.config import DataConfig
from jaxft.data.formats import EXTRAS
from jaxft.data.preferences.prompts import answer_to, messages_of, prompt_in, shared_prompt
from jaxft.data.preferences.ranked import ranked_answers, ranked_pairs, score_of
from jaxft.data.rows.questions import Message, with_system
from jaxft.data.rows.values import RowProblem
from jaxft.errors import did_you_mean

OPENAI = ("preferred_output", "non_preferred_output")
# Columns that mean chosen and rejected and nothing else, where data.chosen_field and data.rejected_field are default.
SPELLINGS = (("preferred", "dispreferred"), ("chosen_response", "rejected_response"))
# The rejected answer to the messages that end in the chosen one (ms-swift).
REJECTED_RESPONSE = "rejected_response"
# Columns that may hold the prompt of text rows; which, a setting must say.
PROMPT_LIKE = ("query", "input", "context", "problem", "post", "user", "user_input", "message", "history", "request")
# The scores of both answers, of which the difference is the margin.
SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A prompt with a chosen and a rejected answer: all of them text, or all of them messages, not yet checked.

    margin: by how much the chosen answer is better, None if the row does not say. form: that of the row. names: of
    both answers in the row. columns: that were read. extras: columns that a rendering reads beside the messages.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    form: str
    names: tuple[str, str]
    columns: frozenset[str]
    margin: float | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)


def preferences_of(row: Mapping[str, Any], config: DataConfig, left_out: Counter[str]) -> list[Preference]:
    """The pairs of a row: one, or those that `data.pairs` makes of a list of ranked answers, which may be none.

    A row is read by its columns, as docs/preferences.md says: a chosen and a rejected answer (TRL's form, with the
    prompt in a column of its own or at the beginning of both), OpenAI's form, or a list of ranked answers. left_out:
    counts the pairs of a list that are `ties` or the `same`. Raises RowProblem if the row is none of these.
    """
    fields = {name: value for name, value in row.items() if value is not None}
    extras = {name: fields[name] for name in EXTRAS if name in fields}
    if any(name in fields for name in OPENAI):
        return [_openai(fields, extras)]
    names = _names(fields, config)
    if names is None and REJECTED_RESPONSE in fields:
        return [_last_answer_chosen(fields, config, extras)]
    if names is None and (answers := ranked_answers(fields, config)) is not None:
        return [
            Preference(
                prompt=answers.prompt,
                chosen=answers.texts[better],
                rejected=answers.texts[worse],
                margin=answers.scores[better] - answers.scores[worse],
                form="ranked",
                names=(f"{answers.name} {better + 1}", f"{answers.name} {worse + 1}"),
                columns=answers.columns | frozenset(EXTRAS),
                extras=extras,
            )
            for better, worse in ranked_pairs(answers, config.pairs, left_out)
        ]
    if names is None:
        raise RowProblem(_no_preference(fields, config))
    return [_pair(fields, names, config, extras)]


def _last_answer_chosen(fields: Mapping[str, Any], config: DataConfig, extras: Mapping[str, Any]) -> Preference:
    """A row in ms-swift's form: messages that end in the chosen answer, and the rejected one in a column of its own."""
    name = next((name for name in (config.messages_field, "messages") if name and name in fields), None)
    messages = messages_of(fields[name], name) if name else ""
    if name is None or isinstance(messages, str) or messages[-1].get("role") != "assistant":
        raise RowProblem(f"it has {REJECTED_RESPONSE!r}, but no messages that end in the chosen answer")
    prompt, of_system = with_system(fields, messages[:-1], config)
    margin, of_margin = _margin(fields)
    return Preference(
        prompt=prompt,
        chosen=messages[-1:],
        rejected=answer_to(prompt, messages_of(fields[REJECTED_RESPONSE], REJECTED_RESPONSE)),
        margin=margin,
        form="preference",
        names=(name, REJECTED_RESPONSE),
        columns=frozenset((name, REJECTED_RESPONSE, *of_system, *of_margin, *EXTRAS)),
        extras=extras,
    )


def _pair(
    fields: Mapping[str, Any], names: tuple[str, str], config: DataConfig, extras: Mapping[str, Any]
) -> Preference:
    prompt, columns = prompt_in(fields, config)
    chosen, rejected = (messages_of(fields[name], name) for name in names)
    form = "preference"
    if prompt is None or _begins_with(prompt, chosen):
        if isinstance(chosen, str):
            _refuse_other_prompt(fields)
        form = "implicit_prompt"
        prompt, chosen, rejected = shared_prompt(chosen, rejected)
        if not isinstance(prompt, str):
            prompt, of_system = with_system(fields, prompt, config)
            columns = {*columns, *of_system}
    margin, of_margin = _margin(fields)
    return Preference(
        prompt=prompt,
        chosen=answer_to(prompt, chosen),
        rejected=answer_to(prompt, rejected),
        margin=margin,
        form=form,
        names=names,
        columns=frozenset((*columns, *names, *of_margin, *EXTRAS)),
        extras=extras,
    )


def _begins_with(prompt: str | list[Message], whole: str | list[Message]) -> bool:
    """Whether a prompt that is text is also a user's message of the conversation that an answer is.

    So it is in HuggingFaceH4/ultrafeedback_binarized.
    """
    if not isinstance(prompt, str) or isinstance(whole, str):
        return False
    return any(message.get("role") == "user" and message.get("content") == prompt for message in whole)


def _refuse_other_prompt(fields: Mapping[str, Any]) -> None:
    """Raises RowProblem if a text row seems to have its prompt in a column: then its answers do not begin with it."""
    likely = [name for name in fields if name.lower() in PROMPT_LIKE or "prompt" in name.lower()]
    if likely:
        raise RowProblem(
            f"it has no column 'prompt', and its prompt may be in {' or in '.join(map(repr, likely))}. Set "
            f"data.prompt_field={likely[0]!r} if it is. Otherwise leave the column out: then the beginning that both "
            "answers share is the prompt."
        )


def _openai(fields: Mapping[str, Any], extras: Mapping[str, Any]) -> Preference:
    missing = [name for name in ("input", *OPENAI) if name not in fields]
    given = fields.get("input")
    if missing or not isinstance(given, Mapping) or "messages" not in given:
        raise RowProblem(
            'it is not in OpenAI\'s form {"input": {"messages": [...]}, "preferred_output": [...], '
            f'"non_preferred_output": [...]}}: it lacks {" and ".join(map(repr, missing)) or "input.messages"}'
        )
    prompt = messages_of(given["messages"], "input.messages")
    margin, of_margin = _margin(fields)
    chosen, rejected = (answer_to(prompt, messages_of(fields[name], name)) for name in OPENAI)
    own = {name: given[name] for name in EXTRAS if given.get(name) is not None}
    return Preference(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=margin,
        form="openai_preference",
        names=OPENAI,
        columns=frozenset(("input", *OPENAI, *of_margin, *EXTRAS)),
        extras={**extras, **own},
    )


def _names(fields: Mapping[str, Any], config: DataConfig) -> tuple[str, str] | None:
    """The columns of the chosen and the rejected answer; None if the row has not both."""
    configured = config.chosen_field, config.rejected_field
    pairs = [configured, *(SPELLINGS if configured == ("chosen", "rejected") else ())]
    return next((pair for pair in pairs if all(name in fields for name in pair)), None)


def _no_preference(fields: Mapping[str, Any], config: DataConfig) -> str:
    missing = [name for name in (config.chosen_field, config.rejected_field) if name not in fields]
    hints = "".join(
        f"{hint} Then set data.{name}_field."
        for name in ("chosen", "rejected")
        if getattr(config, f"{name}_field") in missing
        and (hint := did_you_mean(getattr(config, f"{name}_field"), set(fields) - {config.prompt_field}))
    )
    return (
        f"it is no preference: it lacks {' and '.join(map(repr, missing))}. A row needs {config.prompt_field!r}, "
        f"{config.chosen_field!r} and {config.rejected_field!r} (its keys: {', '.join(sorted(fields)) or 'none'}), or "
        f"a list of ranked answers.{hints} Set data.prompt_field, data.chosen_field and data.rejected_field, or "
        "data.answers_field, to the names of your columns."
    )


def _margin(fields: Mapping[str, Any]) -> tuple[float | None, tuple[str, ...]]:
    """(the margin of a row, None if it has none; the columns that were read for it)."""
    if "margin" in fields:
        return _number(fields, "margin"), ("margin",)
    for better, worse in SCORES:
        if better in fields and worse in fields:
            return _number(fields, better) - _number(fields, worse), (better, worse)
    return None, ()


def _number(fields: Mapping[str, Any], name: str) -> float:
    return score_of(fields[name], repr(name))
