"""An answer apart from the thoughts before it, while its tokens come.

Thoughts stand between tags (Qwen3, R1, Mistral, Command A), the first of which may end the prompt; or in channels of
their own (gpt-oss), which are read from control tokens: their text cannot be told from that of an answer.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxft.data.chat.reasoning import CLOSE, OPEN
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.generation.detokenize import TextStream, UntilStop

# Tags around thoughts; of those that a chat template mentions, the first pair counts.
TAGS = (
    (OPEN, CLOSE), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)  # fmt: skip
CHANNEL, MESSAGE, START, END = "<|channel|>", "<|message|>", "<|start|>", "<|end|>"
FINAL = "final"  # the channel of an answer


class Piece(NamedTuple):
    """New text of an answer, and of its thoughts; either may be empty."""

    answer: str = ""
    thoughts: str = ""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the answers of a model hold thoughts: channels, or a pair of tags.

    opens, closes: the text of the tags. open_id, close_id: their tokens, if each is one; None: they are looked for in
    the text. channels: the ids of CHANNEL, MESSAGE, START and END, instead of tags.
    """

    opens: str = OPEN
    closes: str = CLOSE
    open_id: int | None = None
    close_id: int | None = None
    channels: tuple[int, ...] = ()


def form_of(tokenizer: Tokenizer) -> Form:
    """How the answers to chats of a tokenizer hold thoughts, by its template and its tokens."""
    template, vocabulary = tokenizer.chat_template or "", tokenizer.backend.get_added_vocab()
    channels = tuple(vocabulary[name] for name in (CHANNEL, MESSAGE, START, END) if name in vocabulary)
    if CHANNEL in template and len(channels) == 4:
        return Form(channels=channels)
    opens, closes = next((pair for pair in TAGS if pair[1] in template), TAGS[0])
    open_id, close_id = vocabulary.get(opens), vocabulary.get(closes)
    if open_id is None or close_id is None:
        return Form(opens=opens, closes=closes)
    return Form(opens=opens, closes=closes, open_id=open_id, close_id=close_id)


class PlainStream:
    """An `AnswerStream` for the continuation of a text, in which nothing is told apart."""

    thoughts, in_thoughts = "", False
    called: Sequence[tuple[str, str]] = ()

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._stream = TextStream(tokenizer, stop)

    @property
    def text(self) -> str:
        """All text that is certain."""
        return self._stream.text

    @property
    def stopped(self) -> bool:
        """Whether there was a stop text."""
        return self._stream.stopped

    def push(self, token: int) -> Piece:
        """The text that is certain after this token."""
        return Piece(answer=self._stream.push(token))

    def finish(self) -> Piece:
        """The rest of the text."""
        return Piece(answer=self._stream.finish())


class AnswerStream:
    """Takes the tokens of an answer to a chat one by one, and returns its text and its thoughts as they become certain.

    prompt: the token ids before the answer. stop: texts that end the answer; in thoughts they are not looked for. kept:
    special tokens that are part of the text. recipient: a pattern with the group `name`; a message in whose header it
    is found is a call of a tool, and neither answer nor thoughts. Attributes: thoughts, all there is of them, without
    white space around; called, a name and a text for each such message.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        kept: Collection[int] = (),
        recipient: str | None = None,
    ) -> None:
        self.thoughts = ""
        self.called: list[tuple[str, str]] = []
        self._recipient, self._in_call = recipient, False
        self._tokenizer, self._stop, self._form, self._kept = tokenizer, tuple(stop), form_of(tokenizer), kept
        self._stream, self._answer = TextStream(tokenizer, kept=kept), UntilStop(stop)
        self._in_thoughts = False
        self._header: list[int] | None = None  # the tokens of a message's header, while they come
        self._pending = ""  # text that may be the beginning of a tag
        self._strip = False  # whether white space comes off: at the start of a part that follows thoughts, or is them
        if self._form.channels:
            self._header = []
            _, _, start, _ = self._form.channels
            at = max((i for i, token in enumerate(prompt) if token == start), default=len(prompt))
            for token in prompt[at:]:
                self._push_of_channels(token)
        elif tokenizer.decode(prompt[-32:], skip_special_tokens=False).rstrip().endswith(self._form.opens):
            self._in_thoughts = self._strip = True

    @property
    def text(self) -> str:
        """All of the answer that is certain, cut before a stop text."""
        return self._answer.text

    @property
    def stopped(self) -> bool:
        """Whether there was a stop text."""
        return self._answer.stopped

    @property
    def in_thoughts(self) -> bool:
        """Whether the next token belongs to thoughts, to a call, or to the header of a message."""
        return self._in_thoughts or self._in_call or self._header is not None

    def push(self, token: int) -> Piece:
        """The text that is certain after this token."""
        form = self._form
        if form.channels:
            return self._push_of_channels(token)
        if form.open_id is not None and token in (form.open_id, form.close_id):
            piece = self._written(self._stream.finish())
            return self._joined(piece, self._switch(token == form.open_id))
        return self._written(self._stream.push(token))

    def finish(self) -> Piece:
        """The rest of the text."""
        piece = Piece() if self._header is not None else self._written(self._stream.finish())
        rest, self._pending = self._pending, ""
        piece = self._joined(self._joined(piece, self._add(rest)), Piece(answer=self._answer.finish()))
        before, closed, after = self.text.partition(self._form.closes)
        opened = self.thoughts or self._form.opens in before
        if closed and not opened and not self._form.channels:
            # Written as text, the end of thoughts without a beginning is seen only now.
            self.thoughts, self._answer = before, UntilStop(self._stop)
            self._answer.push(after.lstrip())
            self._answer.finish()
        self.thoughts = self.thoughts.strip()
        return piece

    def _push_of_channels(self, token: int) -> Piece:
        _, message, start, _ = self._form.channels
        if token == message and self._header is not None:
            header = self._tokenizer.decode(self._header, skip_special_tokens=False)
            _, named, channel = header.rpartition(CHANNEL)
            self._header = None
            called = None if self._recipient is None else re.search(self._recipient, header)
            self._in_call = called is not None
            if called is not None:
                self.called.append((called["name"], ""))
                self._stream = TextStream(self._tokenizer, kept=self._kept)
                return Piece()
            return self._switch(bool(named) and (channel.split() or [""])[0] != FINAL)
        if token == start:
            piece = Piece() if self._header is not None else self._written(self._stream.finish())
            self._header = []
            return piece
        if self._header is not None:
            self._header.append(token)
            return Piece()
        return self._written(self._stream.push(token))

    def _switch(self, in_thoughts: bool) -> Piece:
        """Begins another part. Text before an end of thoughts that had no beginning was thoughts."""
        if not in_thoughts and not self._in_thoughts and not self._form.channels:
            self.thoughts, self._answer = self.text, UntilStop(self._stop)
        self._in_thoughts, self._strip = in_thoughts, True
        self._stream = TextStream(self._tokenizer, kept=self._kept)
        if not (in_thoughts and self.thoughts):
            return Piece()
        self.thoughts += "\n\n"
        return Piece(thoughts="\n\n")

    def _written(self, text: str) -> Piece:
        """The pieces of decoded text, in which tags may stand as text."""
        if self._form.channels or self._form.open_id is not None:
            return self._add(text)
        self._pending += text
        tag = self._form.closes if self._in_thoughts else self._form.opens
        if not self._in_thoughts and self.text.strip():  # thoughts come first, or not at all
            text, self._pending = self._pending, ""
            return self._add(text)
        before, tagged, after = self._pending.partition(tag)
        if tagged and (self._in_thoughts or not before.strip()):
            self._pending = ""
            piece = self._add(before) if self._in_thoughts else Piece()
            self._in_thoughts, self._strip = not self._in_thoughts, True
            return self._joined(piece, self._written(after))
        return self._add(self._without_half_tag(tag))

    def _without_half_tag(self, tag: str) -> str:
        """Takes what is held up to the possible beginning of a tag."""
        half = max((n for n in range(1, len(tag)) if self._pending.endswith(tag[:n])), default=0)
        at = len(self._pending) - half
        if not self._in_thoughts and not self._pending[:at].strip():
            at = 0  # white space before a tag that may still come
        text, self._pending = self._pending[:at], self._pending[at:]
        return text

    def _add(self, text: str) -> Piece:
        if self._in_call:
            name, before = self.called[-1]
            self.called[-1] = name, before + text
            return Piece()
        text = text.lstrip() if self._strip else text
        self._strip = self._strip and not text
        if self._in_thoughts:
            self.thoughts += text
            return Piece(thoughts=text)
        return Piece(answer=self._answer.push(text))

    def _joined(self, first: Piece, second: Piece) -> Piece:
        return Piece(first.answer + second.answer, first.thoughts + second.thoughts)


def parts_of(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[str, str]:
    """(thoughts, answer) of a whole answer to a chat. prompt: the token ids before it."""
    stream = AnswerStream(tokenizer, prompt)
    for token in tokens:
        if token not in tokenizer.stop_ids:
            stream.push(int(token))
    stream.finish()
    return stream.thoughts, stream.text


def sampled_text(tokenizer: Tokenizer, tokens: Sequence[int], parts: tuple[str, str] | None) -> str:
    """The text of an answer with its thoughts. parts: thoughts and answer, if it answers a chat.

    Thoughts in a channel, whose text alone nothing tells apart, are written as a `<think>` block.
    """
    if parts is None or not form_of(tokenizer).channels:
        return tokenizer.decode(tokens)
    thoughts, answer = parts
    return f"{OPEN}\n{thoughts}\n{CLOSE}\n\n{answer}" if thoughts else answer
