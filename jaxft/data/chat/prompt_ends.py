"""Where prompts end in the tokens of a conversation, in time that grows with its length and not with its square.

A conversation is encoded once. Of a prompt only the tail is encoded again: the text from the last anchor in it. An
anchor is an added token that tokenizers cuts out of the raw text, before anything else looks at it; the pieces between
such tokens are encoded alone. So the tokens up to an anchor are the same in a prompt as in the whole text, and only
those of the tail have to be compared. The tails of most prompts are the same few characters, which are encoded once.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from jaxft.data.chat.turns import Layout
from jaxft.data.tokenizers.tokenizer import Spans, Tokenizer

# Tails that are kept: short ones, such as the header of an answer, and not too many of them.
KEPT_CHARACTERS = 256
KEPT_TAILS = 1 << 14


class PromptEnds:
    """Encodes training sequences and counts the tokens of the prompts in them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        anchors = anchors_of(tokenizer)
        self._spelling = {number: tokenizer.token(number) for number in anchors.tolist()}
        self._is_anchor = np.isin(np.arange(tokenizer.vocab_size), anchors)
        self._kept: dict[str, list[int]] = {}

    def encode(self, layouts: Sequence[Layout]) -> list[tuple[list[int], list[int | None]]]:
        """(token ids, number of tokens of the prompt of each turn) of every sequence.

        The number is None if the tokens of the prompt are not known to be the first ones of the sequence. A prompt is
        the start of the text of its sequence, as `turns.layouts` ensures.
        """
        encodings = self._tokenizer.encode_batch_with_spans([layout.text for layout in layouts])
        tails = [
            self._tails(layout, ids, spans) if layout.turns else []
            for layout, (ids, spans) in zip(layouts, encodings, strict=True)
        ]
        tokens = self._encode_tails({text for of_one in tails for _, text in of_one})
        out: list[tuple[list[int], list[int | None]]] = []
        for (ids, _), of_one in zip(encodings, tails, strict=True):
            counts: list[int | None] = []
            for at, text in of_one:
                end = at + len(tokens[text])
                counts.append(end if ids[at:end] == tokens[text] else None)
            out.append((ids, counts))
        return out

    def _tails(self, layout: Layout, ids: list[int], spans: Spans) -> list[tuple[int, str]]:
        """(index of the first token, text) of the tail of each prompt; the whole prompt if no anchor is in it."""
        at = np.flatnonzero(self._is_anchor[np.asarray(ids, np.int64)]).tolist()
        starts, ends, indices = [0], [0], [0]
        for index in at:
            start, end = spans(index)
            # A model may have the id of an added token for other text; only the token itself is cut out.
            if layout.text[start:end].lstrip() == self._spelling[ids[index]]:
                starts.append(start)
                ends.append(end)
                indices.append(index)
        lasts = [bisect_right(ends, len(turn.prompt)) - 1 for turn in layout.turns]
        return [(indices[last], turn.prompt[starts[last] :]) for last, turn in zip(lasts, layout.turns, strict=True)]

    def _encode_tails(self, texts: set[str]) -> dict[str, list[int]]:
        new = sorted(texts - self._kept.keys())
        encoded = dict(zip(new, self._tokenizer.encode_batch(new), strict=True))
        tokens = {text: self._kept[text] for text in texts & self._kept.keys()} | encoded
        if len(self._kept) < KEPT_TAILS:
            self._kept.update((text, ids) for text, ids in encoded.items() if len(text) <= KEPT_CHARACTERS)
        return tokens


def anchors_of(tokenizer: Tokenizer) -> np.ndarray:
    """The ids of the tokens that are cut out of the raw text, wherever they are and without what follows them."""
    backend = tokenizer.backend.backend_tokenizer
    return np.array(
        [
            number
            for number, token in backend.get_added_tokens_decoder().items()
            if not (token.normalized or token.rstrip or token.single_word)
            and not (token.special and backend.encode_special_tokens)
            and token.content == token.content.strip()
        ],
        np.int64,
    )
