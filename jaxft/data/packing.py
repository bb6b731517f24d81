"""Packs examples into training sequences. No example is ever split."""

from collections.abc import Sequence

import numpy as np

from jaxft.data.batch import Example
from jaxft.data.encoded.table import ExampleTable, facts_of


def pack(lengths: Sequence[int] | np.ndarray, max_length: int) -> list[list[int]]:
    """Sequences as lists of example indices; the examples of each have at most max_length tokens together.

    Best-fit decreasing: the longest example first, each into the fullest sequence that still has
    room for it, which needs at most 11/9 of the fewest possible sequences. A million examples take
    seconds. Sequences and the examples in them are in order of index; the same lengths always give
    the same plan. Raises ValueError if an example is longer than max_length.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and int(np.max(sizes)) > max_length:
        longest = int(np.argmax(sizes))
        raise ValueError(f"example {longest} has {sizes[longest]} tokens, more than max_length={max_length}")
    order = np.argsort(-sizes, kind="stable")
    sequence_of = np.empty(len(sizes), np.int64)  # by example
    waiting: list[list[int]] = [[] for _ in range(max_length + 1)]  # sequences by the room left in them
    rooms = 0  # bit r is set if waiting[r] is not empty: the lowest set bit from `length` up is the fullest fit
    count = 0
    done = 0
    for length, examples in _runs(sizes[order]):
        end = done + examples
        while done < end:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else max_length
            # A sequence takes examples of this length while it has room for them: then it is the fullest fit.
            each = min(room // length, end - done) if length else end - done
            wanted = (end - done) // each
            if fitting:
                taken = waiting[room][-wanted:][::-1]
                del waiting[room][-wanted:]
                if not waiting[room]:
                    rooms ^= 1 << room
            else:
                taken = list(range(count, count + wanted))
                count += wanted
            stop = done + len(taken) * each
            sequence_of[order[done:stop]] = np.repeat(taken, each)
            waiting[room - each * length] += taken
            rooms |= 1 << (room - each * length)
            done = stop
    return _sequences(sequence_of, count)


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """(value, how often it is repeated) of a sorted array."""
    starts = np.flatnonzero(np.diff(values, prepend=-1)) if len(values) else np.zeros(0, np.int64)
    return list(zip(values[starts].tolist(), np.diff(starts, append=len(values)).tolist(), strict=True))


def _sequences(sequence_of: np.ndarray, count: int) -> list[list[int]]:
    """The examples of each sequence in order of index, and the sequences in order of their first example."""
    flat = np.argsort(sequence_of, kind="stable")
    ends = np.cumsum(np.bincount(sequence_of, minlength=count)) if count else np.zeros(0, np.int64)
    starts = ends - np.diff(ends, prepend=0)
    firsts = np.argsort(flat[starts])
    examples = flat.tolist()
    return [examples[start:end] for start, end in zip(starts[firsts].tolist(), ends[firsts].tolist(), strict=True)]


def plan_of(examples: Sequence[Example], max_length: int, *, packing: bool) -> list[list[int]]:
    """The sequences of examples, by index: packed, or one for each. That of a table is computed once."""
    if not packing:
        return one_each(len(examples))
    if not isinstance(examples, ExampleTable):
        return pack(facts_of(examples).lengths, max_length)
    if max_length not in examples.plans:
        examples.plans[max_length] = pack(examples.facts.lengths, max_length)
    return examples.plans[max_length]


def one_each(count: int) -> list[list[int]]:
    """The plan without packing: every example has a sequence of its own."""
    return [[index] for index in range(count)]
