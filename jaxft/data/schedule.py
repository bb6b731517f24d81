"""The training set of each sequence of a mixture: arithmetic on its position, so that nothing is replayed.

Within a stage the sets take turns as evenly as their rates allow. With two sets of rates 1 - q and q, the second gets
floor(t * q + 1/2) of the first t positions; with more sets, the others share the remaining positions by the same rule.
In every prefix of a stage each set is therefore within one sequence per set of its share, and the number of its
sequences before any position is computed directly. Rates are integers over 2^32, so that every machine rounds alike.
"""

import bisect
from collections.abc import Mapping, Sequence

ONE = 1 << 32


class Schedule:
    """Position in the stream of all sequences -> (set, number of the sequence in that set's own stream).

    A set that takes part again in a later stage continues where it stopped. The last stage has no end.
    """

    def __init__(self, stages: Sequence[tuple[int, Mapping[str, float]]], names: Sequence[str]) -> None:
        """stages: (first position, rate of each set that takes part), by first position, from 0. Rates are relative.

        Raises ValueError if a stage has no rate above zero.
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
        """The number of sequences of each set before a position."""
        stage = max(0, bisect.bisect_left(self._starts, position) - 1)
        within = _counts(position - self._starts[stage], self._chances[stage])
        return [b + n for b, n in zip(self._before[stage], within, strict=True)]


def _chances(rates: Sequence[float]) -> list[int]:
    """Each set's share of the positions that it and the sets before it get together, in units of 1 / 2^32."""
    out, total = [], 0.0
    for rate in rates:
        total += rate
        out.append(round(rate / total * ONE) if rate > 0 else 0)
    if total <= 0:
        raise ValueError(f"a stage needs a rate above zero; its rates are {list(rates)}")
    # There is no set before the first one that takes part, so it gets all remaining positions.
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
