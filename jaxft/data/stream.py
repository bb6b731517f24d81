"""The endless stream of sequences of one training set, with random access."""

import functools
from collections.abc import Sequence

import grain
import numpy as np

from jaxft.data.batch import Example
from jaxft.data.encoded.table import facts_of
from jaxft.data.packing import plan_of


class Stream:
    """One epoch of sequences after another, each shuffled anew; every sequence comes exactly once an epoch.

    Attributes: examples, plan (the examples of each sequence of an epoch, by index).
    """

    def __init__(
        self, examples: Sequence[Example], *, max_length: int, packing: bool = True, shuffle: bool = True, seed: int = 0
    ) -> None:
        """Raises ValueError if there are no examples, or one is longer than max_length."""
        if not examples:
            raise ValueError("a Loader needs at least one example")
        self.examples = examples
        self._facts = facts_of(examples)
        self.plan = plan_of(examples, max_length, packing=packing)
        order = grain.MapDataset.range(len(self.plan))
        # Grain's shuffle computes each index by itself, with another seed in each epoch: seeking is O(1).
        order = (order.shuffle(seed=seed % 2**32) if shuffle else order).repeat()
        # Cached: with few sequences an index takes milliseconds, and batches and counts need the same ones.
        self._at = functools.lru_cache(maxsize=1 << 16)(lambda number: int(order[number]))

    def __len__(self) -> int:
        """Sequences in an epoch."""
        return len(self.plan)

    def __getitem__(self, number: int) -> list[Example]:
        """The documents of sequence `number`, from 0, in any epoch."""
        return self.documents(self.plan[self._at(number)])

    def documents(self, sequence: Sequence[int]) -> list[Example]:
        """The documents of a sequence of the plan."""
        return [document for index in sequence for document in self.examples[index].documents]

    @property
    def like(self) -> Example:
        """A document that has all values and arrays which documents of this set carry."""
        return self.examples[0].documents[0]

    @property
    def tokens(self) -> int:
        """Tokens in an epoch."""
        return int(self._sizes[:, 0].sum())

    def totals(self, count: int) -> tuple[int, int, int]:
        """(rows, tokens, trained tokens) of the first `count` sequences. Documents of a split row count as rows."""
        epochs, rest = divmod(count, len(self))
        tokens, trained, rows = (epochs * self._sizes.sum(axis=0) + self._partial(epochs)[rest]).tolist()
        return rows, tokens, trained

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        """Tokens, trained tokens and rows of every sequence of the plan, [sequences, 3]."""
        own = np.stack([self._facts.lengths, self._facts.trained, np.ones_like(self._facts.lengths)], axis=1)
        order = np.concatenate([np.array(sequence, np.int64) for sequence in self.plan])
        starts = np.cumsum([0, *(len(sequence) for sequence in self.plan[:-1])])
        return np.add.reduceat(own[order], starts, axis=0)

    def _partial(self, epoch: int) -> np.ndarray:
        """`_sizes` summed over the first n sequences of an epoch, for n from 0, [sequences + 1, 3]."""
        # The last epoch is cached: a log asks for the same one over and over.
        if getattr(self, "_kept", (None,))[0] != epoch:
            start = epoch * len(self)
            order = [self._at(start + n) for n in range(len(self))]
            sums = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(self._sizes[order], axis=0)])
            self._kept = (epoch, sums)
        return self._kept[1]
