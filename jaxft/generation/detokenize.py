"""Text from tokens as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from jaxft.data.tokenizers.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what decoders give for bytes that do not make a character yet


class TextStream:
    """Feed it tokens, get text that is safe to show.

    Attributes: text (all that was decoded, cut before a stop string), stopped (whether one was found).
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
        """The text that this token makes certain; often empty, or more than its own."""
        self._ids.append(token)
        piece = self._tail()
        if piece and not piece.endswith(UNFINISHED):
            self._add(piece)
        # Text that may turn out to begin a stop string waits.
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
        found = [at for stop in self._stop if (at := self.text.find(stop, search_from)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _half_stop(self) -> int:
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _show(self, end: int) -> str:
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece
