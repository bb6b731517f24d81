"""Which answers of a conversation share a training sequence.

Some templates write an answer differently once more messages follow: they drop its thoughts, move the tools to the last
question, or end only the last answer. If such an answer were trained in the rendering of the whole conversation, it
would follow, or be, text that never occurs at inference. So each answer is first rendered as at inference, with its
prompt; then answers that read the same in one rendering, up to their end tokens, share it, and the others get sequences
of their own.
"""

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.config import DataConfig
from jaxft.data.chat.mends import LEAVE_OUT, TemplateProblem
from jaxft.data.chat.omissions import MEND, MENDS, Shown, omissions
from jaxft.data.formats import Conversation
from jaxft.data.tokenizers.tokenizer import TemplateLimit, TemplateRefusal, Tokenizer
from jaxft.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One answer as at inference.

    number: of its message, from 1. prompt: the rendered prompt. upto: the conversation rendered up to this answer.
    end: the end of the answer's end token in `upto`, in characters.
    """

    number: int
    prompt: str
    upto: str
    end: int

    @functools.cached_property
    def text(self) -> str:
        """The prompt and the answer, up to the end of its end token."""
        return self.upto[: self.end]

    def reads_the_same_in(self, text: str) -> bool:
        """Whether the text of a longer conversation is the same up to the end of this answer."""
        return text.startswith(self.text)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One training sequence as text, with the answers to locate in its tokens."""

    conversation: Conversation
    text: str
    turns: tuple[Turn, ...]


def layouts(conversation: Conversation, tokenizer: Tokenizer, config: DataConfig, notes: Counter[str]) -> list[Layout]:
    """The sequences of one row, in order of their last answers.

    config.turns: `auto` (the fewest sequences in which every answer reads as at inference), `together` (one), or
    `split` (one for each answer). notes: counts of the facts that deserve a warning. Raises DataError, naming the row,
    if an answer does not continue its own prompt, or `together` is impossible.
    """
    if not conversation.messages:
        text = _to_last_end(conversation.prompt + conversation.completion, len(conversation.prompt), tokenizer)
        turn = Turn(number=1, prompt=conversation.prompt, upto=text, end=len(text))
        return [Layout(conversation=conversation, text=text, turns=(turn,))]
    whole = config.train_on == "all"
    turns = [_turn(conversation, tokenizer, index) for index in trained_answers(conversation, config.train_on)]
    _note_omissions(conversation, turns, config, notes)
    if whole or not turns:
        text = render(conversation, tokenizer, len(conversation.messages))
        _refuse_rewritten([turn for turn in turns if not turn.reads_the_same_in(text)], conversation, text, whole)
        return [Layout(conversation=conversation, text=text, turns=tuple(turns))]
    sequences = []
    while turns:
        text = turns[-1].upto
        shared = turns[-1:] if config.turns == "split" else [turn for turn in turns if turn.reads_the_same_in(text)]
        numbers = {turn.number for turn in shared}
        turns = [turn for turn in turns if turn.number not in numbers]
        if config.turns == "together":
            _refuse_rewritten(turns, conversation, text, whole)
        sequences.append(Layout(conversation=conversation, text=text, turns=tuple(shared)))
    if len(sequences) > 1 and config.turns == "auto":
        notes["split"] += 1
    return sequences[::-1]


def _to_last_end(text: str, start: int, tokenizer: Tokenizer) -> str:
    """A plain text without the white space behind an end token that it ends in, which is no part of the answer.

    start: of the completion.
    """
    bare = text.rstrip()
    ends = tuple(tokenizer.stop_tokens.values())
    return bare if len(bare) > start and bare != text and bare.endswith(ends) else text


def trained_answers(conversation: Conversation, train_on: str) -> list[int]:
    """Indices of the trained messages: all answers that may be trained, or the last of them."""
    messages = conversation.messages
    answers = [i for i in range(conversation.first_trained, len(messages)) if messages[i]["role"] == "assistant"]
    if train_on == "all":
        if conversation.untrained:
            number = min(conversation.untrained) + 1
            raise DataError(
                f"{conversation.where}: message {number} is marked as not to be trained, but data.train_on='all' "
                "trains everything. Set data.train_on='assistant', or remove the mark."
            )
        return [index for index in answers if index > 0]
    answers = [index for index in answers if index not in conversation.untrained]
    return answers[-1:] if train_on == "last" else answers


def render(conversation: Conversation, tokenizer: Tokenizer, upto: int, **kwargs: Any) -> str:
    """The first `upto` messages as text. Raises DataError, naming the row; TemplateProblem if the template refuses."""
    kwargs = {**conversation.template_kwargs, **kwargs}
    try:
        return tokenizer.render(conversation.messages[:upto], tools=conversation.tools, **kwargs)
    except TemplateRefusal as error:
        mend = f"Set data.chat_template to a template that takes them, or change the row; {LEAVE_OUT}."
        what = f"{conversation.where}: {error}{'' if str(error).endswith('.') else '.'}"
        raise TemplateProblem(what, mend, kind=str(error.__cause__)) from error
    except TemplateLimit as error:
        raise TemplateLimit(f"{conversation.where}: {error}") from error
    except DataError as error:
        raise DataError(f"{conversation.where}: {error}") from error


def shared_start(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The number of leading characters, or tokens, that are the same."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def no_end(conversation: Conversation, number: int, tokenizer: Tokenizer) -> TemplateProblem:
    """The error for an answer without an end token."""
    ends = ", ".join(map(repr, tokenizer.stop_tokens.values())) or "none known"
    return TemplateProblem(
        f"{conversation.where}: EOS would never be trained: the template puts no end token ({ends}) after message "
        f"{number} (assistant), so the model would not learn to stop.",
        f"Set data.chat_template to one that writes eos_token after each answer; {LEAVE_OUT}.",
        kind="no end",
    )


def _turn(conversation: Conversation, tokenizer: Tokenizer, index: int) -> Turn:
    where, number = conversation.where, index + 1
    if index == 0:
        raise DataError(
            f"{where}: message 1 is from the assistant, so it has no prompt. Remove it, mark it with train: false, "
            "or train only on the last answer (data.train_on='last')."
        )
    _refuse_ends_inside(conversation, tokenizer, index)
    prompt = render(conversation, tokenizer, index, add_generation_prompt=True)
    upto = render(conversation, tokenizer, number)
    if not upto.startswith(prompt):
        raise TemplateProblem(
            f"{_difference(conversation, number, upto, prompt)} This template writes even the last answer differently "
            "from how it prompts for it.",
            f"Set data.chat_template to one that does not; {LEAVE_OUT}.",
            kind="another answer",
        )
    spans = [(at, at + len(end)) for end in tokenizer.stop_tokens.values() if (at := upto.find(end, len(prompt))) >= 0]
    if not spans:
        raise no_end(conversation, number, tokenizer)
    return Turn(number=number, prompt=prompt, upto=upto, end=min(spans)[1])


def _refuse_ends_inside(conversation: Conversation, tokenizer: Tokenizer, index: int) -> None:
    written = json.dumps(conversation.messages[index], ensure_ascii=False)
    for stop in tokenizer.stop_tokens.values():
        if stop in written:
            raise DataError(
                f"{conversation.where}: the content of message {index + 1} (assistant) holds "
                f"{stop!r}, which ends a turn. Remove it: the chat template writes it where "
                "it belongs."
            )


def _note_omissions(conversation: Conversation, turns: Sequence[Turn], config: DataConfig, notes: Counter[str]) -> None:
    absent: dict[str, int] = {}
    shown = Shown()
    for turn in turns:
        answer = turn.upto[len(turn.prompt) : turn.end]
        parts = omissions(conversation.messages, conversation.tools, turn.number - 1, turn.prompt, answer, shown)
        absent = {what: number for what, number in parts} | absent
    for what, number in absent.items():
        if config.omissions == "refuse":
            of_message = f" of message {number}" if number else ""
            raise TemplateProblem(
                f"{conversation.where}: the chat template leaves {what}{of_message} out, so the model would be trained "
                "without it; data.omissions='warn' trains on what the template shows.",
                f"{MENDS.get(what, MEND)}; {LEAVE_OUT}.",
                kind=f"without {what}",
            )
        notes[what] += 1


def _refuse_rewritten(turns: Sequence[Turn], conversation: Conversation, text: str, whole: bool) -> None:
    if not turns:
        return
    mend = (
        "data.train_on='all' trains on one whole rendering: train on the answers (data.train_on='assistant'), which "
        "gives such an answer a sequence of its own"
        if whole
        else "Set data.turns='auto', which gives such an answer a sequence of its own, or train only on the last "
        "answer (data.train_on='last')"
    )
    difference = _difference(conversation, turns[0].number, text, turns[0].text)
    raise DataError(f"{difference} {mend}, or set data.chat_template to one that does not.")


def _difference(conversation: Conversation, number: int, text: str, other: str) -> str:
    at = shared_start(text, other)
    return (
        f"{conversation.where}: the prompt and answer of message {number} (assistant) are not a prefix of the "
        f"conversation: the template rewrites earlier text. As at inference it reads "
        f"{other[max(0, at - 20) : at + 40]!r}, in the whole conversation {text[max(0, at - 20) : at + 40]!r}."
    )
