"""Sampled answers packed into the batch of an update, and the spans of their tokens in it."""

# B rows, S sequence, P documents that a row can hold

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from jaxft.data.batch import Batch, assemble, most_documents
from jaxft.data.packing import one_each, pack
from jaxft.rollouts.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where a document is in a batch: its row, its number in the row from 0, and the position of its first token.

    prompt: the number of its prompt's tokens there. If an earlier document has the prompt, only the last of them, which
    predicts the first token of the answer.
    """

    row: int
    document: int
    start: int
    prompt: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRollouts:
    """Rollouts as the documents of one batch, in host memory. spans: of each rollout, in their order."""

    rollouts: tuple[Rollout, ...]
    spans: tuple[Span, ...]
    batch: Batch[np.ndarray]

    def by_document(self, numbers: Sequence[float] | np.ndarray) -> np.ndarray:
        """One number for each rollout, in the layout of `Batch.values`: [B, P] float32, 0 elsewhere."""
        rows, length = self.batch.tokens_BS.shape
        out_BP = np.zeros((rows, most_documents(length)), np.float32)
        for span, number in zip(self.spans, numbers, strict=True):
            out_BP[span.row, span.document] = number
        return out_BP

    def by_token(self, values: Sequence[npt.ArrayLike]) -> np.ndarray:
        """Values of the tokens of each answer, in the layout of `Batch.arrays`: [B, S] float32, 0 elsewhere."""
        out_BS = np.zeros(self.batch.tokens_BS.shape, np.float32)
        for one, span, own in zip(self.rollouts, self.spans, values, strict=True):
            out_BS[span.row, self._answer(one, span)] = own
        return out_BS

    def tokens_of(self, values_BS: np.ndarray) -> list[np.ndarray]:
        """The inverse of `by_token`: of an array [B, S], the values of each rollout's answer, [n]."""
        return [
            values_BS[span.row, self._answer(one, span)] for one, span in zip(self.rollouts, self.spans, strict=True)
        ]

    def with_values(self, **values_BP: np.ndarray) -> "PackedRollouts":
        """The rollouts with further `Batch.values`."""
        return replace(self, batch=self.batch._replace(values=self.batch.values | values_BP))

    def with_arrays(self, **arrays_BS: np.ndarray) -> "PackedRollouts":
        """The rollouts with further `Batch.arrays`."""
        return replace(self, batch=self.batch._replace(arrays=self.batch.arrays | arrays_BS))

    @property
    def padding_share(self) -> float:
        """The share of the batch's positions that hold no token."""
        return float(np.mean(self.batch.segments_BS == 0))

    @staticmethod
    def _answer(one: Rollout, span: Span) -> slice:
        # A token's values stand at the position that predicts it.
        start = span.start + span.prompt - 1
        return slice(start, start + len(one.tokens))


def pack_rollouts(
    rollouts: Sequence[Rollout],
    *,
    max_length: int,
    pad_id: int,
    multiple: int = 1,
    packing: bool = True,
    neighbors: int = 1,
) -> PackedRollouts:
    """The rollouts as the documents of as few rows as they need, with their `sampler_logps`.

    multiple: the number of rows is a multiple of it, rounded up so that few shapes are compiled: 1, 2, 3, 4, 6, 8, 12,
    16, ... times it. Further rows are empty. packing: whether a row may hold several. neighbors: so many rollouts that
    follow each other, such as pairs, are neighbours in a row. Raises ValueError if they are longer than max_length.
    """
    examples = [one.example({}) for one in rollouts]
    bundles = [range(start, start + neighbors) for start in range(0, len(examples), neighbors)]
    lengths = [sum(len(examples[index]) for index in bundle) for bundle in bundles]
    plan = pack(lengths, max_length) if packing else one_each(len(bundles))
    plan = [[index for number in row for index in bundles[number]] for row in plan]
    spans: dict[int, Span] = {}
    for row, indices in enumerate(plan):
        start = 0
        for document, index in enumerate(indices):
            spans[index] = Span(row=row, document=document, start=start, prompt=len(rollouts[index].prompt))
            start += len(examples[index])
    rows = [[examples[index] for index in indices] for indices in plan]
    rows += [[]] * (round_up(len(rows), multiple) - len(rows))
    return PackedRollouts(
        rollouts=tuple(rollouts),
        spans=tuple(spans[index] for index in range(len(rollouts))),
        batch=assemble(rows, max_length, pad_id, examples[0]),
    )


def round_up(count: int, multiple: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... times `multiple` that is at least `count`, for few shapes."""
    size = 1
    while size * multiple < count:
        if (size + size // 2) * multiple >= count:
            return (size + size // 2) * multiple
        size *= 2
    return size * multiple
