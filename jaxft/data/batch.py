"""One training batch. Shapes: B batch, S sequence."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from jaxft.nn.whole_documents import WholeDocuments

# np.ndarray on the host, jax.Array on devices, jax.ShapeDtypeStruct in plans.
Array = TypeVar("Array")


class Batch(NamedTuple, Generic[Array]):
    """Token sequences and the target of each position; all arrays are [B, S].

    tokens_BS: int32. targets_BS: int32, the next token of the same document, 0 if there is none.
    weights_BS: float32, 1 if the target is trained, else 0. positions_BS: int32, restarting at
    0 in every packed document. segments_BS: int32, 0 on padding, then 1, 2, ... per document.
    values: numbers of documents by name, [B, P] float32; the number of document p of a row is at p - 1, and places
    without a document hold 0. arrays: values of positions by name, [B, S, ...], at the position that predicts the
    token which they belong to. Both hold what examples carry, so most methods have none.
    whole: where attention finds whole documents, if documents of a row share the tokens that they begin with.
    """

    tokens_BS: Array
    targets_BS: Array
    weights_BS: Array
    positions_BS: Array
    segments_BS: Array
    values: dict[str, Array] = {}
    arrays: dict[str, Array] = {}
    whole: WholeDocuments[Array] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One document. tokens: int32[n]. mask: uint8[n], 1 on trained tokens. row: index in its source. part: index of its
    conversation among those of the row.

    mask[0] is always 0: nothing comes before the first token that could predict it. values: numbers by name, one for
    each of `documents`. arrays: values of tokens by name, [n, ...].
    """

    tokens: np.ndarray
    mask: np.ndarray
    row: int
    part: int = 0
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def documents(self) -> "tuple[Example, ...]":
        """The documents that it occupies in a sequence: itself, or the parts of an example that is packed as one."""
        return (self,)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its documents for people, such as chosen and rejected; that of an only document is empty."""
        return ("",)

    def prepend(self, first: Sequence[int]) -> "Example":
        """The example with tokens before its own that are not trained."""
        tokens = np.concatenate([np.array(first, self.tokens.dtype), self.tokens])
        mask = np.concatenate([np.zeros(len(first), self.mask.dtype), self.mask])
        arrays = {n: np.concatenate([np.zeros((len(first), *x.shape[1:]), x.dtype), x]) for n, x in self.arrays.items()}
        return replace(self, tokens=tokens, mask=mask, arrays=arrays)


def most_documents(max_length: int) -> int:
    """The number P of documents that a row can hold: each has a token of a prompt and a trained one."""
    return max_length // 2


def assemble(
    rows: Iterable[Sequence[Example]], max_length: int, pad_id: int = 0, like: Example | None = None
) -> Batch[np.ndarray]:
    """A numpy Batch, each row of which is the given documents one after another, padded on the right.

    like: a document whose names of values and arrays all documents have; none has any if None. Raises ValueError if a
    row holds more than max_length tokens.
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
    batch = Batch(tokens_BS, targets_BS, weights_BS, positions_BS, segments_BS)
    return (
        batch
        if like is None
        else batch._replace(values=_values(rows, max_length, like), arrays=_arrays(rows, max_length, like))
    )


def _values(rows: Sequence[Sequence[Example]], max_length: int, like: Example) -> dict[str, np.ndarray]:
    values = {name: np.zeros((len(rows), most_documents(max_length)), np.float32) for name in like.values}
    for name, values_BP in values.items():
        for b, documents in enumerate(rows):
            for p, document in enumerate(documents):
                (values_BP[b, p],) = document.values[name]
    return values


def _arrays(rows: Sequence[Sequence[Example]], max_length: int, like: Example) -> dict[str, np.ndarray]:
    arrays = {name: np.zeros((len(rows), max_length, *x.shape[1:]), x.dtype) for name, x in like.arrays.items()}
    for name, array_BS in arrays.items():
        for b, documents in enumerate(rows):
            start = 0
            for document in documents:
                end = start + len(document.tokens)
                array_BS[b, start : end - 1] = document.arrays[name][1:]
                start = end
    return arrays
