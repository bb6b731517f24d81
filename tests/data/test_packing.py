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
