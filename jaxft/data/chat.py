"""From a conversation to token ids and the mask of the tokens that are trained.

How an answer is found: the chat template renders the whole conversation, and again only what comes
before the answer, as a model would be prompted. The second text must begin the first, and its
tokens must begin the first one's tokens; the answer is what follows, up to and including the token
that ends the turn. No generation tags are needed, and the model is trained on exactly what it
continues when it generates.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from jaxft.data.batch import Example
from jaxft.data.formats import Conversation
from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import DataError

# Conversations tokenised together: enough to keep every core busy, few enough to hold in memory.
CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """One answer: its message number from 1, what prompts it, and the conversation up to it."""

    number: int
    prompt: str
    upto: str


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """A conversation as text, with the answers to find in its tokens."""

    conversation: Conversation
    text: str
    turns: tuple[_Turn, ...]

    @property
    def prompts(self) -> list[str]:
        return [turn.prompt for turn in self.turns]

    @property
    def goes_on(self) -> bool:
        """Whether an answer is followed by more, so that its end must be found in the text too."""
        return any(turn.upto != self.text for turn in self.turns)


def encode(conversation: Conversation, tokenizer: Tokenizer, train_on: str = "assistant") -> Example:
    """Tokens and mask of one conversation; see `encode_all`."""
    return next(encode_all([conversation], tokenizer, train_on))


def encode_all(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, train_on: str = "assistant"
) -> Iterator[Example]:
    """Tokens and mask of every conversation, in order.

    train_on: `assistant` (every assistant turn, or the completion), `last` (only the last assistant
    turn), `all` (every token but the first). Tokens after the last trained one are left out: they
    could not change the loss.
    Raises DataError, naming the row, where the answers cannot be found exactly: the template
    rewrites what came before, tokens straddle the start of an answer, an answer has no end token,
    BOS doubles, or nothing is left to train on.
    """
    remaining = iter(conversations)
    while chunk := list(islice(remaining, CHUNK)):
        layouts = [_lay_out(conversation, tokenizer, train_on) for conversation in chunk]
        wholes = tokenizer.encode_batch([a.text for a in layouts], offsets=any(a.goes_on for a in layouts))
        prompts = iter(tokenizer.encode_batch([text for a in layouts for text in a.prompts], offsets=False))
        for layout, whole in zip(layouts, wholes, strict=True):
            mark = _mark_chat if layout.conversation.messages else _mark_plain
            yield mark(layout, whole, list(islice(prompts, len(layout.turns))), tokenizer, train_on)


def prompt_of(conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], str]:
    """The tokens that ask for the last answer, and that answer's text, to score by generation.

    The tokens are the very prefix that training conditions on. Raises DataError for a `text` row,
    which asks nothing, and where the last answer opens the conversation.
    """
    if not conversation.messages:
        if not conversation.prompt:
            raise DataError(f"{conversation.where}: plain text has no prompt to answer")
        ids = tokenizer.encode(conversation.prompt)
        return _bos(tokenizer) + ids, conversation.completion
    last = _answers(conversation)[-1]
    if last == 0:
        raise DataError(f"{conversation.where}: the answer is the first message, so nothing asks for it")
    prompt = _render(conversation, tokenizer, last, add_generation_prompt=True)
    reference = conversation.messages[last]["content"]
    if not reference:  # a tool call is compared as the template writes it
        example = encode(conversation, tokenizer, "last")
        reference = tokenizer.decode(example.tokens[example.mask == 1])
    return tokenizer.encode(prompt), reference


def _answers(conversation: Conversation) -> list[int]:
    messages = conversation.messages
    return [i for i in range(conversation.first_trained, len(messages)) if messages[i]["role"] == "assistant"]


def _lay_out(conversation: Conversation, tokenizer: Tokenizer, train_on: str) -> _Layout:
    if not conversation.messages:
        prompt = conversation.prompt
        turn = _Turn(number=1, prompt=prompt, upto=prompt + conversation.completion)
        return _Layout(conversation=conversation, text=turn.upto, turns=(turn,))
    text = _render(conversation, tokenizer, len(conversation.messages))
    answers = {"assistant": _answers(conversation), "last": _answers(conversation)[-1:], "all": []}[train_on]
    turns = tuple(_turn(conversation, tokenizer, index, text) for index in answers)
    return _Layout(conversation=conversation, text=text, turns=turns)


def _turn(conversation: Conversation, tokenizer: Tokenizer, index: int, text: str) -> _Turn:
    where, number = conversation.where, index + 1
    message = conversation.messages[index]
    if index == 0:
        raise DataError(
            f"{where}: message 1 is from the assistant, so nothing prompts it. Remove it, or train only on the last "
            "answer (data.train_on='last')."
        )
    for stop in tokenizer.stop_ids:
        if tokenizer.token(stop) in message["content"]:
            raise DataError(
                f"{where}: the content of message {number} (assistant) holds {tokenizer.token(stop)!r}, which ends a "
                "turn. Remove it: the chat template writes it where it belongs."
            )
    prompt = _render(conversation, tokenizer, index, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise DataError(_rewritten(conversation, number, text, prompt))
    last = number == len(conversation.messages)
    upto = text if last else _render(conversation, tokenizer, number)
    return _Turn(number=number, prompt=prompt, upto=upto)


def _mark_chat(layout: _Layout, whole: Any, prompts: Sequence[Any], tokenizer: Tokenizer, train_on: str) -> Example:
    conversation, ids = layout.conversation, whole.ids
    _refuse_double_bos(conversation, ids, tokenizer)
    mask = np.zeros(len(ids), np.uint8)
    end = 0
    if train_on == "all":
        end = max((i for i, token in enumerate(ids) if token in tokenizer.stop_ids), default=0)
        if end == 0:
            raise DataError(_no_end(conversation, len(conversation.messages), tokenizer))
        mask[1 : end + 1] = 1
    for turn, prompt in zip(layout.turns, prompts, strict=True):
        start = len(prompt.ids)
        if ids[:start] != prompt.ids:
            raise DataError(_drifted(conversation, turn, ids, prompt.ids, tokenizer))
        end = next((i for i in range(start, len(ids)) if ids[i] in tokenizer.stop_ids), -1)
        if turn.upto != layout.text:
            _check_end(layout, turn, whole.token_to_chars(end)[1] if end >= 0 else len(layout.text), tokenizer)
        if end < 0:
            raise DataError(_no_end(conversation, turn.number, tokenizer))
        mask[start : end + 1] = 1
    return _example(conversation, ids[: end + 1], mask[: end + 1])


def _check_end(layout: _Layout, turn: _Turn, end: int, tokenizer: Tokenizer) -> None:
    """An answer must read the same, up to its end token at character `end`, as when nothing follows it."""
    if layout.text[:end] == turn.upto[:end]:
        return
    same = _shared(layout.text, turn.upto)
    # Where only the end is missing, the end token that was found is one of a later message.
    if turn.upto[same:].strip() in ("", *map(tokenizer.token, tokenizer.stop_ids)):
        raise DataError(_no_end(layout.conversation, turn.number, tokenizer))
    raise DataError(_rewritten(layout.conversation, turn.number, layout.text, turn.upto))


def _mark_plain(layout: _Layout, whole: Any, prompts: Sequence[Any], tokenizer: Tokenizer, train_on: str) -> Example:
    conversation, ids, prompt = layout.conversation, whole.ids, prompts[0].ids
    if ids[: len(prompt)] != prompt:
        raise DataError(_drifted(conversation, layout.turns[0], ids, prompt, tokenizer))
    bos = _bos(tokenizer)
    if tokenizer.eos_id is None:
        raise DataError(
            f"{conversation.where}: EOS would never be trained, because the tokenizer {tokenizer.name} has none. "
            "Set eos_token in its tokenizer_config.json."
        )
    ended = bool(ids) and ids[-1] in tokenizer.stop_ids
    ids = bos + ids + ([] if ended else [tokenizer.eos_id])
    _refuse_double_bos(conversation, ids, tokenizer)
    mask = np.ones(len(ids), np.uint8)
    if train_on != "all":
        mask[: len(bos) + len(prompt)] = 0
    return _example(conversation, ids, mask)


def _example(conversation: Conversation, ids: Sequence[int], mask: np.ndarray) -> Example:
    mask[:1] = 0
    if not mask.any():
        raise DataError(f"{conversation.where} trains on zero tokens: its answer is empty once it is tokenised")
    return Example(tokens=np.asarray(ids, np.int32), mask=mask, row=conversation.row)


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []


def _render(conversation: Conversation, tokenizer: Tokenizer, upto: int, **kwargs: Any) -> str:
    try:
        return tokenizer.render(conversation.messages[:upto], tools=conversation.tools, **kwargs)
    except DataError as error:
        raise DataError(f"{conversation.where}: {error}") from error


def _refuse_double_bos(conversation: Conversation, ids: Sequence[int], tokenizer: Tokenizer) -> None:
    if tokenizer.bos_id is None or list(ids[:2]) != [tokenizer.bos_id] * 2:
        return
    bos = tokenizer.token(tokenizer.bos_id)
    cause = (
        f"both the chat template and the first message write {bos!r}; remove it from one of them"
        if conversation.messages
        else f"the tokenizer adds {bos!r} and the row begins with it too; remove it from the row"
    )
    raise DataError(f"{conversation.where}: BOS doubles: {cause}")


def _rewritten(conversation: Conversation, number: int, text: str, other: str) -> str:
    at = _shared(text, other)
    answers = _answers(conversation)
    mend = (
        "This template writes even the last answer differently from how it prompts for it: set data.chat_template "
        "to one that does not."
        if number == answers[-1] + 1
        else "Train only on the last answer (data.train_on='last'), or set data.chat_template to one that does not."
    )
    return (
        f"{conversation.where}: the prompt of message {number} (assistant) is not a prefix of the conversation: the "
        f"template rewrites earlier text. When the answer is asked for it reads {other[max(0, at - 20) : at + 40]!r}, "
        f"in the whole conversation {text[max(0, at - 20) : at + 40]!r}. {mend}"
    )


def _drifted(
    conversation: Conversation, turn: _Turn, ids: Sequence[int], prompt: Sequence[int], tokenizer: Tokenizer
) -> str:
    at = _shared(ids, prompt)
    mend = (
        "Remove white space from the start of the answer, or change the template's generation prompt."
        if conversation.messages
        else "Move the white space between them from the end of the prompt to the start of the completion."
    )
    return (
        f"{conversation.where}: the tokens of the prompt are not a prefix of those of prompt + answer (message "
        f"{turn.number}): token {at} is {_spelled(prompt, at, tokenizer)} in the prompt alone and "
        f"{_spelled(ids, at, tokenizer)} before the answer, so the model would be trained on a prompt that it never "
        f"sees. {mend}"
    )


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading characters, or tokens, are the same."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _spelled(ids: Sequence[int], at: int, tokenizer: Tokenizer) -> str:
    return repr(tokenizer.token(ids[at])) if at < len(ids) else "absent"


def _no_end(conversation: Conversation, number: int, tokenizer: Tokenizer) -> str:
    ends = ", ".join(repr(tokenizer.token(i)) for i in sorted(tokenizer.stop_ids)) or "none known"
    return (
        f"{conversation.where}: EOS would never be trained: the template puts no end token ({ends}) after message "
        f"{number} (assistant), so the model would not learn to stop. Set data.chat_template to one that writes "
        "eos_token after each answer, or train_on='last' where only earlier answers lack it."
    )
