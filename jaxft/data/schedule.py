"""Which training set each sequence of a mixture comes from: arithmetic on its position, so that nothing is replayed.

Within a stage the sets take turns as evenly as their rates allow. With two sets of rates q and 1 - q, the second gets
floor(t * q + 1/2) of the first t positions; with more, the others share what the last one leaves, by the same rule.
Every prefix of a stage therefore has each set within one sequence per set of its share, and how many of them came
before any position is known without counting. Rates are integers over 2^32, so that no rounding differs anywhere.
"""

import bisect
from collections.abc import Mapping, Sequence

ONE = 1 << 32


class Schedule:
    """Position in the stream of all sequences -> (set, number of the sequence in that set's own stream).

    A set goes on where it was when it takes part again in a later stage; after the last stage, that one goes on.
    """

    def __init__(self, stages: Sequence[tuple[int, Mapping[str, float]]], names: Sequence[str]) -> None:
        """stages: (first position, rate of each set that takes part), by first position, from 0. Rates are relative.

        Raises ValueError where a stage has no rate above zero.
        """
        self.names = tuple(names)
        self._starts = [start for start, _ in stages]
        self._chances = [_chances([rates.get(name, 0.0) for name in self.names]) for _, rates in stages]
        self._before = [[0] * len(self.names)]
        for index, start in enumerate(self._starts[1:]):
            within = _counts(start - self._starts[index], self._chances[index])
            self._before.append([b + n for b, n in zip(self._before[-1], within, strict=True)])

    def at(self, position: int) -> tuple[int, int]:
        """(index of the set, number of the sequence in it) of a position from 0."""
        stage = bisect.bisect_right(self._starts, position) - 1
        rest, chances = position - self._starts[stage], self._chances[stage]
        for index in reversed(range(len(chances))):
            taken = _share(rest, chances[index])
            if _share(rest + 1, chances[index]) > taken:
                return index, self._before[stage][index] + taken
            rest -= taken
        raise ValueError(f"no set takes part at position {position}")

    def counts(self, position: int) -> list[int]:
        """How many sequences of each set lie before a position."""
        stage = max(0, bisect.bisect_left(self._starts, position) - 1)
        within = _counts(position - self._starts[stage], self._chances[stage])
        return [b + n for b, n in zip(self._before[stage], within, strict=True)]


def _chances(rates: Sequence[float]) -> list[int]:
    """For each set, the share of what it and the sets before it get together, in units of 1 / 2^32."""
    out, total = [], 0.0
    for rate in rates:
        total += rate
        out.append(round(rate / total * ONE) if rate > 0 else 0)
    if total <= 0:
        raise ValueError(f"a stage needs a rate above zero; its rates are {list(rates)}")
    # Nothing stands before the first set that takes part, so it takes all that is left.
    out[next(i for i, rate in enumerate(rates) if rate > 0)] = ONE
    return out


def _share(positions: int, chance: int) -> int:
    return (positions * chance + ONE // 2) >> 32


def _counts(positions: int, chances: Sequence[int]) -> list[int]:
    out = [0] * len(chances)
    for index in reversed(range(len(chances))):
        out[index] = _share(positions, chances[index])
        positions -= out[index]
    return out
