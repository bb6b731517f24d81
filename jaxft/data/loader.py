"""Batches by step number. Shapes: B batch, S sequence.

The sequences of all epochs form one endless stream, shuffled anew in each epoch; step s takes
sequences s*B to (s+1)*B - 1 of it. A batch at the end of an epoch is filled from the next one, so
every batch is full and every sequence comes exactly once an epoch. Nothing is remembered between
steps: a resumed run asks for its next step and goes on where it was.
"""

import math
from collections.abc import Iterator, Sequence

import grain

from jaxft.data.batch import Batch, Example, assemble
from jaxft.data.packing import one_each, pack


class Loader:
    """Batches of packed or single examples, as a pure function of the step.

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
    ) -> None:
        """Raises ValueError where there are no examples, or one is longer than max_length."""
        if not examples:
            raise ValueError("a Loader needs at least one example")
        self.examples, self.batch_size, self.max_length, self.pad_id = examples, batch_size, max_length, pad_id
        lengths = [len(example) for example in examples]
        self.plan = pack(lengths, max_length) if packing else one_each(len(examples))
        order = grain.MapDataset.range(len(self.plan))
        # Grain's shuffle computes each index by itself, with another seed in each epoch: seeking is O(1).
        self._order = (order.shuffle(seed=seed % 2**32) if shuffle else order).repeat()

    @property
    def steps_per_epoch(self) -> float:
        """Sequences / batch_size: not whole where the last batch of an epoch runs into the next."""
        return len(self.plan) / self.batch_size

    def steps_for(self, epochs: float) -> int:
        """The fewest steps that see so many epochs of sequences."""
        # Rounded first: 0.1 * 30 is a hair above 3.
        return max(1, math.ceil(round(epochs * self.steps_per_epoch, 6)))

    def epoch_of(self, step: int) -> float:
        """Epochs seen when `step` steps are done."""
        return step / self.steps_per_epoch

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step, from 0, as numpy arrays [B, S].

        rows: only these rows of it, for a process that feeds only its own devices.
        """
        start = step * self.batch_size
        positions = range(start, start + self.batch_size)[rows or slice(None)]
        return self._assemble([self.plan[int(self._order[position])] for position in positions])

    def eval_batches(self, rows: slice | None = None) -> Iterator[Batch]:
        """Every sequence once, in order; the last batch is filled up with empty rows (segment 0)."""
        return (self.eval_batch(number, rows) for number in range(self.eval_steps))

    @property
    def eval_steps(self) -> int:
        """How many `eval_batches` there are."""
        return -(-len(self.plan) // self.batch_size)

    def eval_batch(self, number: int, rows: slice | None = None) -> Batch:
        """One of the `eval_batches`, from 0."""
        sequences = self.plan[number * self.batch_size : (number + 1) * self.batch_size]
        sequences += [[]] * (self.batch_size - len(sequences))
        return self._assemble(sequences[rows or slice(None)])

    def _assemble(self, sequences: Sequence[Sequence[int]]) -> Batch:
        documents = [[self.examples[index] for index in sequence] for sequence in sequences]
        return assemble(documents, self.max_length, self.pad_id)
