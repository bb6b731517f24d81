"""Text from a stream of tokens: only whole characters, and no part of a stop string."""

from collections.abc import Sequence

from jaxft.data.tokenizers.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # decoders give this for bytes that are not a whole character yet


class TextStream:
    """Takes tokens one by one and returns text that will not change any more.

    Attributes: text (all decoded text, cut before a stop string), stopped (whether there was a stop string).
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._context = 0  # decoding starts here: a token's text can depend on the one before it
        self._decoded = 0  # tokens that are in `text`
        self._shown = 0  # characters that were returned

    def push(self, token: int) -> str:
        """The text that is certain after this token: often empty, sometimes more than the token's own."""
        self._ids.append(token)
        piece = self._tail()
        if piece and not piece.endswith(UNFINISHED):
            self._add(piece)
        # Text that may be the start of a stop string is not returned yet.
        return self._show(len(self.text) - (0 if self.stopped else self._half_stop()))

    def finish(self) -> str:
        """The rest of the text; an unfinished last character is dropped."""
        if not self.stopped:
            self._add(self._tail().rstrip(UNFINISHED))
        return self._show(len(self.text))

    def _tail(self) -> str:
        known = self._tokenizer.decode(self._ids[self._context : self._decoded])
        return self._tokenizer.decode(self._ids[self._context :])[len(known) :]

    def _add(self, piece: str) -> None:
        search_from = max(0, len(self.text) - max(map(len, self._stop), default=0))
        self.text += piece
        self._context, self._decoded = self._decoded, len(self._ids)
        starts = [at for stop in self._stop if (at := self.text.find(stop, search_from)) >= 0]
        if starts:
            self.text, self.stopped = self.text[: min(starts)], True

    def _half_stop(self) -> int:
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _show(self, end: int) -> str:
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece
