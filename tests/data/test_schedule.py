"""Which set comes when: the closed form equals counting, shares are met at every prefix, stages go on."""

import random

import pytest

from jaxft.data.schedule import Schedule


def drawn(rng, names):
    rates = {name: rng.choice([0.0, rng.random(), rng.random() ** 4]) for name in names}
    return rates if sum(rates.values()) else rates | {names[-1]: 1.0}


@pytest.mark.parametrize("seed", range(40))
def test_counts_are_what_counting_gives(seed):
    rng = random.Random(seed)
    names = [f"s{i}" for i in range(rng.randint(1, 5))]
    stages = [(0, drawn(rng, names))]
    for _ in range(rng.randint(0, 3)):
        stages.append((stages[-1][0] + rng.randint(1, 100), drawn(rng, names)))
    schedule, counts = Schedule(stages, names), [0] * len(names)
    for position in range(500):
        assert schedule.counts(position) == counts
        index, number = schedule.at(position)
        assert number == counts[index]  # a set's own sequences come in turn, over stages too
        counts[index] += 1
        rates = next(rates for start, rates in reversed(stages) if start <= position)
        assert rates[names[index]] > 0


@pytest.mark.parametrize("rates", [(0.7, 0.3), (0.01, 0.99), (0.5, 0.3, 0.2), (1.0, 5.0, 3.0, 1e-3)])
def test_every_prefix_has_its_shares(rates):
    names = [f"s{i}" for i in range(len(rates))]
    schedule = Schedule([(0, dict(zip(names, rates, strict=True)))], names)
    for position in (*range(300), 10**6, 10**12):
        for count, rate in zip(schedule.counts(position), rates, strict=True):
            assert abs(count - position * rate / sum(rates)) < len(rates) + position * 2**-31


def test_a_set_that_pauses_goes_on_where_it_was():
    schedule = Schedule([(0, {"a": 1, "b": 1}), (4, {"b": 1}), (6, {"a": 1})], ["a", "b"])
    assert [schedule.at(position) for position in range(9)] == [
        (1, 0), (0, 0), (1, 1), (0, 1), (1, 2), (1, 3), (0, 2), (0, 3), (0, 4),
    ]  # fmt: skip


def test_a_stage_without_rates_is_refused():
    with pytest.raises(ValueError, match="needs a rate above zero"):
        Schedule([(0, {"a": 0.0})], ["a"])
