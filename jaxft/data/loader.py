"""Batches of one set by step number. Shapes: B batch, S sequence.

The sequences of all epochs form one endless stream, shuffled anew in each epoch; step s takes
sequences s*B to (s+1)*B - 1 of it. A batch at the end of an epoch is filled from the next one, so
every batch is full and every sequence comes exactly once an epoch. The loader has no state: a
resumed run asks for its next step and continues where it stopped.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from jaxft.data.batch import Batch, Example, assemble
from jaxft.data.stream import Stream


class Loader:
    """Batches of packed or single examples: the BatchSource of one set.

    Attributes: batch_size, max_length, plan (the examples of each sequence, by index).
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        max_length: int,
        packing: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        pad_id: int = 0,
        epochs: float = 1.0,
        steps: int | None = None,
    ) -> None:
        """A run has `steps`, or as many as see `epochs` of the sequences.

        Raises ValueError if there are no examples, or one is longer than max_length.
        """
        self.batch_size, self.max_length, self.pad_id = batch_size, max_length, pad_id
        self._stream = Stream(examples, max_length=max_length, packing=packing, shuffle=shuffle, seed=seed)
        self.plan = self._stream.plan
        self.total_steps = steps or self.steps_for(epochs)

    @property
    def steps_per_epoch(self) -> float:
        """Sequences / batch_size: not whole if the last batch of an epoch runs into the next."""
        return len(self.plan) / self.batch_size

    def steps_for(self, epochs: float) -> int:
        """The fewest steps that see `epochs` epochs of sequences."""
        return steps_for(epochs, len(self.plan), self.batch_size)

    def epoch_of(self, step: int) -> float:
        return step / self.steps_per_epoch

    def metrics(self, step: int) -> dict[str, float]:
        return {}  # shares of sets are for a mixture

    def batch(self, step: int, rows: slice | None = None) -> Batch[np.ndarray]:
        documents = [self._stream[position] for position in positions(step, self.batch_size, rows)]
        return assemble(documents, self.max_length, self.pad_id, self._stream.like)

    def eval_batches(self, rows: slice | None = None) -> Iterator[Batch[np.ndarray]]:
        """Every sequence once, in order; the last batch is filled up with empty rows (segment 0)."""
        return (self.eval_batch(number, rows) for number in range(self.eval_steps))

    @property
    def eval_steps(self) -> int:
        """The number of `eval_batches`."""
        return -(-len(self.plan) // self.batch_size)

    def eval_batch(self, number: int, rows: slice | None = None) -> Batch[np.ndarray]:
        """Batch `number` of the `eval_batches`, from 0."""
        sequences = self.plan[number * self.batch_size : (number + 1) * self.batch_size]
        sequences += [[]] * (self.batch_size - len(sequences))
        documents = [self._stream.documents(sequence) for sequence in sequences[rows or slice(None)]]
        return assemble(documents, self.max_length, self.pad_id, self._stream.like)


def steps_for(epochs: float, sequences: int, batch_size: int) -> int:
    """The fewest steps that see `epochs` epochs of `sequences` sequences."""
    # Rounded first: 0.1 * 30 is a hair above 3.
    return max(1, math.ceil(round(epochs * sequences / batch_size, 6)))


def positions(step: int, batch_size: int, rows: slice | None) -> range:
    """Positions of a batch's rows in the endless stream of sequences."""
    return range(step * batch_size, (step + 1) * batch_size)[rows or slice(None)]
