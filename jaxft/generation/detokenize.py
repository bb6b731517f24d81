"""Text from a stream of tokens: only whole characters, and no part of a stop string."""

import itertools
from collections.abc import Collection, Sequence

from jaxft.data.tokenizers.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # decoders give this for bytes that are not a whole character yet


class UntilStop:
    """Takes pieces of text and returns those that are certainly before a stop string.

    Attributes: text (all text, cut before a stop string), stopped (whether there was one).
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._stop = tuple(stop)
        self._shown = 0  # characters that were returned

    def push(self, piece: str) -> str:
        """The text that is certain after this piece."""
        if piece and not self.stopped:
            search_from = max(0, len(self.text) - max(map(len, self._stop), default=0))
            self.text += piece
            starts = [at for stop in self._stop if (at := self.text.find(stop, search_from)) >= 0]
            if starts:
                self.text, self.stopped = self.text[: min(starts)], True
        # Text that may be the start of a stop string is not returned yet.
        return self._show(len(self.text) - (0 if self.stopped else self._half_stop()))

    def finish(self) -> str:
        """The rest of the text."""
        return self._show(len(self.text))

    def _half_stop(self) -> int:
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _show(self, end: int) -> str:
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


class TextStream:
    """Takes tokens one by one and returns text that will not change any more.

    kept: special tokens whose spelling is part of the text, such as those that mark calls of tools.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), kept: Collection[int] = ()) -> None:
        self._tokenizer, self._until, self._kept = tokenizer, UntilStop(stop), frozenset(kept)
        self._ids: list[int] = []
        self._context = 0  # decoding starts here: a token's text can depend on the one before it
        self._decoded = 0  # tokens that are in `text`

    @property
    def text(self) -> str:
        """All decoded text, cut before a stop string."""
        return self._until.text

    @property
    def stopped(self) -> bool:
        """Whether there was a stop string."""
        return self._until.stopped

    def push(self, token: int) -> str:
        """The text that is certain after this token: often empty, sometimes more than the token's own."""
        self._ids.append(token)
        piece = self._tail()
        if not piece or piece.endswith(UNFINISHED):
            return self._until.push("")
        self._context, self._decoded = self._decoded, len(self._ids)
        return self._until.push(piece)

    def finish(self) -> str:
        """The rest of the text; an unfinished last character is dropped."""
        piece = "" if self.stopped else self._until.push(self._tail().rstrip(UNFINISHED))
        return piece + self._until.finish()

    def _tail(self) -> str:
        known = self._text_of(self._ids[self._context : self._decoded])
        return self._text_of(self._ids[self._context :])[len(known) :]

    def _text_of(self, ids: Sequence[int]) -> str:
        if self._kept.isdisjoint(ids):
            return self._tokenizer.decode(ids)
        pieces = []
        for kept, run in itertools.groupby(ids, self._kept.__contains__):
            part = list(run)
            pieces.append("".join(map(self._tokenizer.token, part)) if kept else self._tokenizer.decode(part))
        return "".join(pieces)
