"""One training batch. Shapes: B batch, S sequence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np

# np.ndarray on the host, jax.Array on devices, jax.ShapeDtypeStruct in plans.
Array = TypeVar("Array")


class Batch(NamedTuple, Generic[Array]):
    """Token sequences and the target of each position; all arrays are [B, S].

    tokens_BS: int32. targets_BS: int32, the next token of the same document, 0 if there is none.
    weights_BS: float32, 1 if the target is trained, else 0. positions_BS: int32, restarting at
    0 in every packed document. segments_BS: int32, 0 on padding, then 1, 2, ... per document.
    """

    tokens_BS: Array
    targets_BS: Array
    weights_BS: Array
    positions_BS: Array
    segments_BS: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One document. tokens: int32[n]. mask: uint8[n], 1 on trained tokens. row: index in its source.

    mask[0] is always 0: nothing comes before the first token that could predict it.
    """

    tokens: np.ndarray
    mask: np.ndarray
    row: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def documents(self) -> "tuple[Example, ...]":
        """The documents that it takes up in a sequence: itself, or the parts of an example that is packed as one."""
        return (self,)

    def prepend(self, first: Sequence[int]) -> "Example":
        """The example with tokens before its own that are not trained."""
        tokens = np.concatenate([np.array(first, self.tokens.dtype), self.tokens])
        mask = np.concatenate([np.zeros(len(first), self.mask.dtype), self.mask])
        return replace(self, tokens=tokens, mask=mask)


def assemble(rows: Iterable[Sequence[Example]], max_length: int, pad_id: int = 0) -> Batch[np.ndarray]:
    """A numpy Batch, each row of which is the given documents one after another, padded on the right.

    Raises ValueError if a row holds more than max_length tokens.
    """
    rows = list(rows)
    shape = (len(rows), max_length)
    tokens_BS, targets_BS = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    weights_BS = np.zeros(shape, np.float32)
    positions_BS, segments_BS = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for b, documents in enumerate(rows):
        start = 0
        for segment, document in enumerate(documents, 1):
            end = start + len(document)
            if end > max_length:
                raise ValueError(f"row {b} holds at least {end} tokens, more than max_length={max_length}")
            tokens_BS[b, start:end] = document.tokens
            targets_BS[b, start : end - 1] = document.tokens[1:]
            weights_BS[b, start : end - 1] = document.mask[1:]
            positions_BS[b, start:end] = np.arange(end - start)
            segments_BS[b, start:end] = segment
            start = end
    return Batch(tokens_BS, targets_BS, weights_BS, positions_BS, segments_BS)
