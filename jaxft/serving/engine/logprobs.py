"""Log-probabilities of tokens with their texts, as the protocol has them."""

import re
from typing import Any

from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.generation.detokenize import UNFINISHED
from jaxft.generation.request import TopTokens

LEAST = -9999.0  # JSON has no infinity
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_characters() -> dict[str, int]:
    """The characters by which byte-level vocabularies spell bytes (GPT-2): printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_characters()


def shown_token(tokenizer: Tokenizer, token: int, logprob: float, top: TopTokens = ()) -> dict[str, Any]:
    """A token with its log-probability, and the likeliest ones in its place.

    bytes: of its text; of a part of a character, if its vocabulary says which.
    """
    text = tokenizer.decode([token], skip_special_tokens=False)
    shown = {"token": text, "logprob": max(logprob, LEAST), "bytes": _bytes_of(tokenizer, token, text)}
    return shown | ({"top": [shown_token(tokenizer, other, value) for other, value in top]} if top else {})


def _bytes_of(tokenizer: Tokenizer, token: int, text: str) -> list[int] | None:
    if UNFINISHED not in text:
        return list(text.encode())
    spelled = tokenizer.token(token)
    if (match := BYTE.fullmatch(spelled)) is not None:
        return [int(match[1], 16)]
    return [BYTES[one] for one in spelled] if all(one in BYTES for one in spelled) else None
