"""One answer while its tokens come: its text, its thoughts, its calls of tools, and what the server is told of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.generation.called_tools import CallForm, CallStream
from jaxft.generation.request import Request, TopTokens
from jaxft.generation.thoughts import AnswerStream, Piece, PlainStream
from jaxft.serving.engine.logprobs import shown_token

Tell = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Answering:
    """What the answers to a request have in common. id: of the request. calls: None if no tools may be called."""

    id: str
    tokenizer: Tokenizer
    is_chat: bool
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    tools: Sequence[Mapping[str, Any]] = ()
    calls: CallForm | None = None


class Choice:
    """The answer with this index. prompt: its token ids. tell: takes its messages. on_end: called at its end."""

    def __init__(
        self, answering: Answering, index: int, prompt: Sequence[int], tell: Tell, on_end: Callable[["Choice"], None]
    ) -> None:
        self.index, self.tokens, self.cancelled = index, 0, False
        self._answering, self._tell, self._on_end = answering, tell, on_end
        tokenizer, stop, form = answering.tokenizer, answering.stop, answering.calls
        kept, recipient = ((), None) if form is None else (form.kept, form.syntax.recipient)
        self._stream = (
            AnswerStream(tokenizer, prompt, stop, kept, recipient)
            if answering.is_chat
            else PlainStream(tokenizer, stop)
        )
        self._calls = None if form is None else CallStream(form.syntax, answering.tools)
        self._text = self._thoughts = ""
        self._uncertain: list[dict[str, Any]] = []  # log-probabilities of tokens whose text is still held
        self._certain: list[dict[str, Any]] = []

    def on_token(self, token: int, logprob: float, top: TopTokens) -> bool:
        """Takes a token; True if it is the last one."""
        tokenizer = self._answering.tokenizer
        if token in tokenizer.stop_ids:
            return True
        was_in_thoughts = self._stream.in_thoughts
        if self._answering.logprobs:
            self._uncertain.append(shown_token(tokenizer, token, logprob, top))
        piece = self._stream.push(token)
        if piece.thoughts or was_in_thoughts or self._stream.in_thoughts:
            self._uncertain = []
        self._add(piece)
        return self._stream.stopped

    def _add(self, piece: Piece) -> None:
        text = piece.answer if self._calls is None else self._calls.push(piece.answer)
        self._show(text, piece.thoughts)

    def _show(self, text: str, thoughts: str = "") -> None:
        self._text, self._thoughts = self._text + text, self._thoughts + thoughts
        if text:
            self._certain, self._uncertain = self._certain + self._uncertain, []

    def flush(self) -> None:
        """Tells what has come since the last call."""
        if not self._text and not self._thoughts:
            return
        message = {"id": self._answering.id, "kind": "piece", "index": self.index}
        message |= {"text": self._text} if self._text else {}
        message |= {"thoughts": self._thoughts} if self._thoughts else {}
        message |= {"logprobs": self._certain} if self._certain else {}
        self._text, self._thoughts, self._certain = "", "", []
        self._tell(message)

    def on_end(self, request: Request) -> None:
        """Tells the rest, and how it ended."""
        self.tokens, self.cancelled = len(request.tokens), request.cancelled
        if not request.cancelled:
            self._add(self._stream.finish())
            if self._calls is not None:
                self._show(self._calls.finish(self._stream.called))
            self.flush()
            calls = [] if self._calls is None else self._calls.calls
            reason = "tool_calls" if calls and request.finish_reason == "stop" else request.finish_reason
            told = [{"name": call.name, "arguments": call.arguments} for call in calls]
            message = {"id": self._answering.id, "kind": "ended", "index": self.index, "reason": reason}
            self._tell(message | ({"calls": told} if told else {}))
        self._on_end(self)
