"""The calls of tools in an answer apart from its text, while it comes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxft.data.chat.call_syntax import Call, CallSyntax, learn
from jaxft.data.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class CallForm:
    """How the answers of a model call tools. kept: the special tokens that mark calls."""

    syntax: CallSyntax
    kept: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "CallForm | None":
        """That of a tokenizer's chat template; None if it has none, or writes no calls in a form that is known."""
        if tokenizer.chat_template is None or (syntax := learn(tokenizer.render)) is None:
            return None
        added = tokenizer.backend.added_tokens_decoder.items()
        marks = {
            id for id, token in added if token.special and token.content.strip() and token.content in syntax.spelled
        }
        return cls(syntax, frozenset(marks - tokenizer.stop_ids))


@dataclass
class CallStream:
    """Takes the pieces of an answer's text and returns what is certainly no call. tools: of the request."""

    syntax: CallSyntax
    tools: Sequence[Mapping[str, Any]]
    calls: tuple[Call, ...] = field(default=(), init=False)
    _pending: str = field(default="", init=False)
    _in_calls: bool = field(default=False, init=False)
    _begun: bool = field(default=False, init=False)

    def push(self, piece: str) -> str:
        """The text that is certain after this piece."""
        self._pending += piece
        if self._in_calls:
            return ""
        at = None if self._begun and not self.syntax.marker else self.syntax.begins(self._pending)
        if at is not None:
            self._in_calls = True
            text, self._pending = self._pending[:at], self._pending[at:]
            return text.rstrip()
        end = len(self._pending) - (0 if self._begun and not self.syntax.marker else self.syntax.pending(self._pending))
        text, self._pending = self._pending[:end], self._pending[end:]
        self._begun = self._begun or bool(text.strip())
        return text

    def finish(self, called: Sequence[tuple[str, str]] = ()) -> str:
        """The rest of the text, which are calls that could not be read; sets `calls` to those that could.

        called: names and texts of messages that are calls by their headers.
        """
        if self.syntax.recipient is not None:
            parsed = [self.syntax.call_of(name, text, self.tools) for name, text in called]
            self.calls = tuple(call for call in parsed if call is not None)
            return self._pending + "".join(text for call, (_, text) in zip(parsed, called, strict=True) if call is None)
        self.calls = self.syntax.calls(self._pending, self.tools) if self._in_calls else ()
        return "" if self.calls else self._pending
