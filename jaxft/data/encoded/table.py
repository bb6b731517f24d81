"""Examples as columns: tokens and masks are read where they lie, in memory or in a mapped file, when one is taken."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import numpy as np

from jaxft.data.batch import Example
from jaxft.nn.virtual import FIRST

NO_END = -1  # in `Facts.ends`: the last token is not trained


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tokens of consecutive examples, one after another. tokens, mask: of all of them; unsigned integers.

    offsets: where each example begins in them, and where the last one ends, int64[n + 1].
    """

    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an examination asks of every example, as columns [n].

    lengths: tokens. trained: trained tokens. rows: index of the row. ends: the last token if it is trained, else
    NO_END.
    """

    lengths: np.ndarray
    trained: np.ndarray
    rows: np.ndarray
    ends: np.ndarray

    def __getitem__(self, at: np.ndarray) -> "Facts":
        return Facts(lengths=self.lengths[at], trained=self.trained[at], rows=self.rows[at], ends=self.ends[at])


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleTable(Sequence[Example]):
    """A sequence of examples that is kept as columns; every example is made when it is taken.

    numbers: where each example is among those of all `parts`. facts: of the examples, in the order of numbers. hashes:
    of their tokens without `first`, uint64. of_row: index of each among the conversations of its row. values: numbers
    by name; NaN if absent. first: token ids at the start of every example, before those of parts; they are not trained.
    """

    parts: Sequence[Part]
    numbers: np.ndarray
    facts: Facts
    of_row: np.ndarray
    hashes: np.ndarray
    values: dict[str, np.ndarray] = field(default_factory=dict)
    first: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> Example: ...

    @overload
    def __getitem__(self, at: slice) -> "ExampleTable": ...

    def __getitem__(self, at: int | slice) -> "Example | ExampleTable":
        if isinstance(at, slice):
            return self.take(np.arange(len(self))[at])
        part, number = self._locate(int(self.numbers[at]))
        start, end = part.offsets[number : number + 2].tolist()
        tokens = np.empty(len(self.first) + end - start, np.int32)
        mask = np.zeros(len(tokens), np.uint8)
        tokens[: len(self.first)] = self.first
        tokens[len(self.first) :] = part.tokens[start:end]
        mask[len(self.first) :] = part.mask[start:end]
        values = {name: float(column[at]) for name, column in self.values.items()}
        return Example(
            tokens=tokens,
            mask=mask,
            row=int(self.facts.rows[at]),
            part=int(self.of_row[at]),
            values={name: (value,) for name, value in values.items() if not np.isnan(value)},
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[at] for at in range(len(self)))

    def end_to_end(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lengths, int64; tokens of all examples, int32; their masks, uint8), one example after another."""
        lengths, lead = self.facts.lengths, len(self.first)
        begins = np.cumsum(lengths) - lengths
        tokens, mask = np.empty(int(lengths.sum()), np.int32), np.zeros(int(lengths.sum()), np.uint8)
        for number, token in enumerate(self.first):
            tokens[begins + number] = token
        of_part = np.searchsorted(self._starts, self.numbers, side="right") - 1
        for index in np.unique(of_part).tolist():
            at, part = np.flatnonzero(of_part == index), self.parts[index]
            own = lengths[at] - lead
            within = np.arange(int(own.sum())) - np.repeat(np.cumsum(own) - own, own)
            source = np.repeat(part.offsets[self.numbers[at] - self._starts[index]], own) + within
            target = np.repeat(begins[at] + lead, own) + within
            tokens[target], mask[target] = part.tokens[source], part.mask[source]
        return lengths, tokens, mask

    def take(self, at: np.ndarray) -> "ExampleTable":
        """Some of the examples, by index, in the given order."""
        return replace(
            self,
            numbers=self.numbers[at],
            facts=self.facts[at],
            of_row=self.of_row[at],
            hashes=self.hashes[at],
            values={name: column[at] for name, column in self.values.items()},
        )

    def prepend(self, first: Sequence[int]) -> "ExampleTable":
        """The table with tokens before those of every example, which are not trained."""
        facts = replace(self.facts, lengths=self.facts.lengths + len(first))
        return replace(self, first=(*first, *self.first), facts=facts)

    def with_pieces(self, at: np.ndarray, pieces: Sequence[Sequence[Example]]) -> "ExampleTable":
        """The table with pieces in the place of the examples at these indices, which are in order."""
        counts = np.ones(len(self), np.int64)
        counts[at] = [len(of_one) for of_one in pieces]
        added = table_of([piece for of_one in pieces for piece in of_one], len(self.first))
        order = np.repeat(np.arange(len(self)), counts)
        order[np.isin(order, at)] = len(self) + np.arange(len(added))
        return self._followed_by(added).take(order)

    def _followed_by(self, added: "ExampleTable") -> "ExampleTable":
        def values_of(table: ExampleTable, name: str) -> np.ndarray:
            return table.values.get(name, np.full(len(table), np.nan))

        return replace(
            self,
            parts=(*self.parts, *added.parts),
            numbers=np.concatenate([self.numbers, added.numbers + sum(map(len, self.parts))]),
            facts=_joined([self.facts, added.facts]),
            of_row=np.concatenate([self.of_row, added.of_row]),
            hashes=np.concatenate([self.hashes, added.hashes]),
            values={
                name: np.concatenate([values_of(self, name), values_of(added, name)])
                for name in sorted({*self.values, *added.values})
            },
        )

    def _locate(self, number: int) -> tuple[Part, int]:
        at = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.parts[at], number - int(self._starts[at])

    @functools.cached_property
    def plans(self) -> dict[int, list[list[int]]]:
        """Plans of sequences of these examples by the length of sequences, for `packing.plan_of`."""
        return {}

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.parts)])


@dataclass(frozen=True, eq=False)
class Joined(Sequence[Example]):
    """Several sequences of examples, one after another. Facts and hashes are those of the sequences."""

    sequences: tuple[Sequence[Example], ...]

    def __len__(self) -> int:
        return sum(map(len, self.sequences))

    @overload
    def __getitem__(self, at: int) -> Example: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Example]: ...

    def __getitem__(self, at: int | slice) -> Example | Sequence[Example]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        number = at + len(self) if at < 0 else at
        for one in self.sequences:
            if number < len(one):
                return one[number]
            number -= len(one)
        raise IndexError(at)

    def __iter__(self) -> Iterator[Example]:
        return (example for one in self.sequences for example in one)


def join(sequences: Sequence[Sequence[Example]]) -> Sequence[Example]:
    """All examples of several sequences, one sequence after another; nothing is copied."""
    return sequences[0] if len(sequences) == 1 else Joined(tuple(sequences))


def take(examples: Sequence[Example], at: np.ndarray) -> Sequence[Example]:
    """Some of the examples, by index, in the given order."""
    return examples.take(at) if isinstance(examples, ExampleTable) else [examples[number] for number in at.tolist()]


def with_pieces(examples: Sequence[Example], at: np.ndarray, pieces: Sequence[Sequence[Example]]) -> Sequence[Example]:
    """The examples with pieces of them in the place of those at some indices, which are in order."""
    if isinstance(examples, ExampleTable):
        return examples.with_pieces(at, pieces)
    replaced = dict(zip(at.tolist(), pieces, strict=True))
    return [piece for number, example in enumerate(examples) for piece in replaced.get(number, (example,))]


def table_of(examples: Sequence[Example], lead: int = 0) -> ExampleTable:
    """A table of these examples, in memory, without the first `lead` tokens of each, which are to be its `first`."""
    shorter = [replace(example, tokens=example.tokens[lead:], mask=example.mask[lead:]) for example in examples]
    facts = facts_of(examples)
    part = Part(
        tokens=np.concatenate([np.zeros(0, np.int32), *(example.tokens for example in shorter)]),
        mask=np.concatenate([np.zeros(0, np.uint8), *(example.mask for example in shorter)]),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(facts.lengths - lead)]),
    )
    names = sorted({name for example in examples for name in example.values})
    return ExampleTable(
        parts=(part,),
        numbers=np.arange(len(examples)),
        facts=facts,
        of_row=np.array([example.part for example in examples], np.int64),
        hashes=hashes_of(examples),
        values={name: np.array([e.values.get(name, (np.nan,))[0] for e in examples], np.float64) for name in names},
    )


def end_to_end(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lengths, int64; tokens, int32; masks, uint8) of all documents of some examples, one after another."""
    if isinstance(examples, ExampleTable):
        return examples.end_to_end()
    documents = [document for example in examples for document in example.documents]
    return (
        np.array([len(document) for document in documents], np.int64),
        np.concatenate([np.zeros(0, np.int32), *(document.tokens for document in documents)]).astype(np.int32),
        np.concatenate([np.zeros(0, np.uint8), *(document.mask for document in documents)]).astype(np.uint8),
    )


def facts_of(examples: Sequence[Example]) -> Facts:
    """The facts of any examples; those of a table are at hand."""
    if isinstance(examples, ExampleTable):
        return examples.facts
    if isinstance(examples, Joined) and examples.sequences:
        return _joined([facts_of(one) for one in examples.sequences])
    return Facts(
        lengths=np.array([len(example) for example in examples], np.int64),
        trained=np.array([int(example.mask.sum()) for example in examples], np.int64),
        rows=np.array([example.row for example in examples], np.int64),
        ends=np.array([int(e.tokens[-1]) if len(e.mask) and e.mask[-1] else NO_END for e in examples], np.int64),
    )


def _joined(parts: Sequence[Facts]) -> Facts:
    return Facts(
        lengths=np.concatenate([part.lengths for part in parts]),
        trained=np.concatenate([part.trained for part in parts]),
        rows=np.concatenate([part.rows for part in parts]),
        ends=np.concatenate([part.ends for part in parts]),
    )


def hashes_of(examples: Sequence[Example]) -> np.ndarray:
    """The hash of the tokens of every example, without virtual ones, uint64 [n]."""
    if isinstance(examples, ExampleTable):
        return examples.hashes
    if isinstance(examples, Joined) and examples.sequences:
        return np.concatenate([hashes_of(one) for one in examples.sequences])
    return np.array([hash_of(example.tokens[example.tokens < FIRST]) for example in examples], np.uint64)


def hash_of(tokens: np.ndarray) -> int:
    """A hash of token ids, 64 bits: of a million examples, two differ and have the same one once in 37 million sets."""
    return int.from_bytes(hashlib.blake2b(tokens.astype(np.int32).tobytes(), digest_size=8).digest(), "little")
