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
    plan: list[list[int]] = []
    waiting: list[list[int]] = [[] for _ in range(max_length + 1)]  # sequences by the room left in them
    rooms = 0  # bit r is set if waiting[r] is not empty: the lowest set bit from `length` up is the fullest fit
    for index in np.argsort(-sizes, kind="stable").tolist():
        length = int(sizes[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = waiting[room].pop()
            if not waiting[room]:
                rooms ^= 1 << room
        else:
            room, sequence = max_length, len(plan)
            plan.append([])
        plan[sequence].append(index)
        waiting[room - length].append(sequence)
        rooms |= 1 << (room - length)
    return sorted(sorted(sequence) for sequence in plan)


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
