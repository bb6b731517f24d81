"""Batches of several training sets with weights, in stages. Shapes: B batch, S sequence.

A weight is a share of tokens: rows of two sets may differ in length tenfold, and a step learns from tokens. Each set is
packed by itself, so a sequence belongs to one set; the rate of a set's sequences is its weight divided by their mean
number of tokens. A set that is used up is repeated, shuffled anew each time.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.batch import Batch, assemble
from jaxft.data.loader import positions, steps_for
from jaxft.data.prepare import TrainSet
from jaxft.data.schedule import Schedule
from jaxft.data.stream import Stream
from jaxft.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of one set in a run, or in some of its steps. epochs: how often the set is seen.

    token_share, trained_share: the set's share of all tokens, and of all trained tokens.
    """

    name: str
    rows: int
    sequences: int
    epochs: float
    tokens: int
    trained_tokens: int
    token_share: float
    trained_share: float


class Mixture:
    """Batches of several sets: a BatchSource that also depends on the length of the run.

    Attributes: batch_size, total_steps, schedule, streams (by name).
    """

    def __init__(
        self,
        sets: tuple[TrainSet, ...],
        data: DataConfig,
        *,
        batch_size: int,
        seed: int = 0,
        pad_id: int = 0,
        epochs: float = 1.0,
        steps: int | None = None,
    ) -> None:
        """data: its mixture, stages, max_length, packing and shuffle are read.

        The run has `steps` steps; if None, enough to see `epochs` times the number of sequences of all sets together.
        """
        self.batch_size, self.pad_id, self._data = batch_size, pad_id, data
        # Seeded by name: adding another set does not change the order of this one.
        self.streams = {
            one.name: Stream(
                one.examples,
                max_length=data.max_length,
                packing=data.packing,
                shuffle=data.shuffle,
                seed=seed + zlib.crc32(one.name.encode()),
            )
            for one in sets
        }
        self._sequences = sum(len(stream) for stream in self.streams.values())
        self.total_steps = steps or self.steps_for(epochs)
        self.schedule = Schedule(self._stages(), tuple(self.streams))

    @property
    def steps_per_epoch(self) -> float:
        """Sequences of all sets / batch_size. An epoch is as many sequences as all sets have together."""
        return self._sequences / self.batch_size

    def steps_for(self, epochs: float) -> int:
        """The fewest steps that see `epochs` times the number of sequences of all sets."""
        return steps_for(epochs, self._sequences, self.batch_size)

    def epoch_of(self, step: int) -> float:
        return step / self.steps_per_epoch

    def batch(self, step: int, rows: slice | None = None) -> Batch[np.ndarray]:
        streams, documents = list(self.streams.values()), []
        for position in positions(step, self.batch_size, rows):
            index, number = self.schedule.at(position)
            documents.append(streams[index][number])
        return assemble(documents, self._data.max_length, self.pad_id, streams[0].like)

    def metrics(self, step: int) -> dict[str, float]:
        """token_share/NAME of every set: its share of the tokens of the first `step` steps."""
        return {f"token_share/{share.name}": share.token_share for share in self.shares(0, step)}

    def shares(self, start: int, end: int) -> list[Share]:
        """The part of each set in the steps from start to end - 1, counted and not estimated."""
        counts = [self.schedule.counts(step * self.batch_size) for step in (start, end)]
        taken = [
            tuple(b - a for a, b in zip(stream.totals(first), stream.totals(last), strict=True))
            for stream, first, last in zip(self.streams.values(), *counts, strict=True)
        ]
        all_tokens, all_trained = (max(1, sum(totals[i] for totals in taken)) for i in (1, 2))
        return [
            Share(
                name=name,
                rows=rows,
                sequences=last - first,
                epochs=(last - first) / len(self.streams[name]),
                tokens=tokens,
                trained_tokens=trained,
                token_share=tokens / all_tokens,
                trained_share=trained / all_trained,
            )
            for name, first, last, (rows, tokens, trained) in zip(self.streams, *counts, taken, strict=True)
        ]

    def stages(self) -> list[tuple[int, int, dict[str, float]]]:
        """(first step, step after the last, weight of each set that takes part) of every stage."""
        edges, reached = [0], 0.0
        for share, _ in self._data.schedule:
            reached += share
            edges.append(round(reached * self.total_steps))
        weights = [weights for _, weights in self._data.schedule]
        return [(a, b, w) for a, b, w in zip(edges, edges[1:], weights, strict=False)]

    def check_epochs(self) -> None:
        """Raises DataError if a set would be seen more often than its max_epochs allows."""
        for share in self.shares(0, self.total_steps):
            most = self._data.mixture[share.name].max_epochs
            if most is not None and share.epochs > most + 1e-9:
                fits = int(self.total_steps * most / share.epochs)
                raise DataError(
                    f"the set {share.name!r} would be seen {share.epochs:.2f} times in {self.total_steps:,} steps, "
                    f"more than data.mixture.{share.name}.max_epochs={most:g}. Lower its weight, give it more rows, "
                    f"train for fewer steps (about {fits:,}), or raise max_epochs."
                )

    def _stages(self) -> list[tuple[int, dict[str, float]]]:
        """(first position, rate of each set) of every stage that has a step, for `Schedule`."""
        out = []
        for start, end, weights in self.stages():
            rates = {name: w * len(self.streams[name]) / self.streams[name].tokens for name, w in weights.items()}
            if end > start:
                out.append((start * self.batch_size, rates))
        return out
