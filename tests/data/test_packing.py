"""Packing plans: whole, within bounds, deterministic, tight."""

import numpy as np
import pytest

from jaxft.data.packing import one_each, pack


@pytest.mark.parametrize("seed", range(5))
def test_every_example_once_and_within_bounds(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, size=500)
    plan = pack(lengths, 64)
    assert sorted(index for sequence in plan for index in sequence) == list(range(500))
    assert max(lengths[sequence].sum() for sequence in map(np.array, plan)) <= 64
    assert plan == pack(lengths, 64)
    # Best-fit decreasing needs at most 11/9 of the fewest possible, plus one.
    assert len(plan) <= 11 / 9 * np.ceil(lengths.sum() / 64) + 1


def test_a_perfect_fit_is_found():
    assert pack([6, 5, 5, 4, 4, 4, 2, 2], 8) == [[0, 6], [1], [2, 7], [3, 4], [5]]
    assert pack([8, 8], 8) == [[0], [1]]
    assert pack([], 8) == []


def test_order_is_by_index():
    plan = pack([3] * 6, 6)
    assert plan == [[0, 1], [2, 3], [4, 5]]


def test_too_long_is_refused():
    with pytest.raises(ValueError, match=r"example 1 has 9 tokens"):
        pack([3, 9], 8)


def test_without_packing():
    assert one_each(3) == [[0], [1], [2]]


def best_fit_decreasing(lengths, max_length):
    """One example after another, the longest first, into the fullest sequence that fits, the latest of several."""
    sequences, rooms, arrival = [], [], []
    for time, index in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fits = [s for s, room in enumerate(rooms) if room >= lengths[index]]
        if not fits:
            sequences, rooms, arrival = [*sequences, []], [*rooms, max_length], [*arrival, time]
        s = min(fits, key=lambda s: (rooms[s], -arrival[s]), default=len(sequences) - 1)
        sequences[s].append(index)
        rooms[s] -= lengths[index]
        arrival[s] = time
    return sorted(sorted(sequence) for sequence in sequences)


def test_runs_of_equal_lengths_are_packed_as_one_after_another():
    random = np.random.default_rng(0)
    for _ in range(300):
        max_length = int(random.integers(1, 60))
        lengths = random.integers(random.integers(0, 2), max_length + 1, size=int(random.integers(0, 80))).tolist()
        assert pack(lengths, max_length) == best_fit_decreasing(lengths, max_length)
