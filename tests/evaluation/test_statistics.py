"""Intervals and tests: published examples, scipy as the reference, and coverage in simulations with fixed seeds."""

import functools

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, norm

from jaxft.evaluation.statistics import (
    Z_POWER,
    Pairs,
    Z,
    bca_interval,
    detectable,
    holm,
    mcnemar,
    newcombe_interval,
    permutation_p,
    rows_needed,
    standing,
    wilson_interval,
)


def pairs(both: int, first: int, second: int, neither: int) -> Pairs:
    return Pairs(both=both, only_first=first, only_second=second, neither=neither)


@functools.cache
def p_of(first: int, discordant: int) -> float:
    return mcnemar(pairs(0, first, discordant - first, 0))


# Newcombe 1998, statistics in medicine 17, table III, method 10; Fagerland, Lydersen and Laake 2014, statistics in
# medicine 33, the airway reactions of Bentur et al.
@pytest.mark.parametrize(("counts", "low", "high"), [((36, 12, 2, 0), 0.0569, 0.3404), ((1, 1, 7, 12), -0.507, -0.026)])
def test_newcombe_s_interval_equals_published_examples(counts, low, high):
    digits = 4 if low > 0 else 3
    assert [round(end, digits) for end in newcombe_interval(pairs(*counts))] == [low, high]


# The exact conditional p-values of the same paper: the data of Bentur et al. and those of Cavo et al.
@pytest.mark.parametrize(("counts", "p"), [((1, 1, 7, 12), 0.0703), ((59, 6, 16, 80), 0.0525)])
def test_mcnemar_equals_published_examples(counts, p):
    assert round(mcnemar(pairs(*counts)), 4) == p


def test_ways_that_never_differ_and_the_bounds():
    same = pairs(30, 0, 0, 30)
    low, high = newcombe_interval(same)
    assert mcnemar(same) == 1.0 and low == -high and 0 < high < 0.1
    assert newcombe_interval(pairs(0, 9, 0, 0))[1] == 1.0
    counted = Pairs.of([True, True, False, 0.0], [True, False, False, 1.0])
    assert counted == pairs(1, 1, 1, 1) and counted.difference == 0 and counted.discordant == 2
    with pytest.raises(ValueError, match="2 and 1 rows are not pairs"):
        Pairs.of([1, 0], [1])


@pytest.mark.parametrize(("correct", "total"), [(0, 5), (5, 5), (3, 120)])
def test_wilson_s_interval_equals_scipy_s(correct, total):
    expected = binomtest(correct, total).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson_interval(correct, total), expected, atol=1e-9)


def test_bca_equals_scipy_s():
    values = np.random.default_rng(3).exponential(size=40)
    for statistic in (np.mean, np.median):
        expected = bootstrap(
            (values,), statistic, vectorized=True, axis=-1, n_resamples=2000, method="BCa", rng=np.random.default_rng(5)
        ).confidence_interval
        assert bca_interval(values, statistic, draws=2000, seed=5) == (expected.low, expected.high)
    assert bca_interval([0.5] * 9) is None and bca_interval([0.5]) is None


def test_clusters_are_drawn_whole():
    values = np.repeat(np.random.default_rng(1).normal(size=12), 10)
    low, high = bca_interval(values, clusters=np.repeat(np.arange(12), 10))
    one_each = bca_interval(values[::10])
    np.testing.assert_allclose((low, high), one_each, atol=0.05)
    assert high - low > 2 * np.diff(bca_interval(values))[0]
    assert bca_interval([1.0, 1.0, 1.0], clusters=["a", "b", "b"]) is None


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_a_permutation_p_is_that_of_all_signs():
    d = np.array([0.3, 0.1, 0.4, -0.2, 0.5, 0.25])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    exact = np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-12)
    assert permutation_p(d, draws=20_000) == pytest.approx(exact, abs=0.01)


def test_where_an_interval_stands_to_the_margin():
    for interval, expected in {
        (0.03, 0.4): "better", (-0.3, -0.02): "worse", (-0.01, 0.015): "equal", (0.0, 0.3): "open", (-0.3, 0.3): "open",
        (0.02, 0.3): "better", (-0.02, 0.01): "open",
    }.items():  # fmt: skip
        assert standing(interval, 0.02) == expected, interval


def test_rows_that_would_do_show_the_difference_at_four_of_five_draws():
    generator = np.random.default_rng(0)
    first, second, both = 0.2, 0.1, 0.4  # only one of them right, and both
    rows = rows_needed(first - second, first + second - (first - second) ** 2, 0.02)
    draws = generator.multinomial(rows, [both, first, second, 1 - first - second - both], size=400)
    shown = [newcombe_interval(pairs(*map(int, one)))[0] >= 0.02 for one in draws]
    assert 0.75 <= np.mean(shown) <= 0.85
    assert rows_needed(0.0201, 0.3, 0.02) is None and rows_needed(0.5, 0.0, 0.02) == 2


@pytest.mark.parametrize(("rows", "discordant"), [(120, 0.2), (400, 0.1)])
def test_a_detectable_difference_is_found_with_its_power(rows, discordant):
    difference = detectable(rows, discordant)
    share = (discordant + difference) / (2 * discordant)
    generator = np.random.default_rng(1)
    discordants = generator.binomial(rows, discordant, size=1500)
    found = [p_of(int(generator.binomial(k, share)), int(k)) <= 0.05 for k in discordants]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)
    assert detectable(20, 0.1) is None


@pytest.mark.parametrize("rows", [60, 120, 400])
@pytest.mark.parametrize("shares", [(0.45, 0.1, 0.1, 0.35), (0.2, 0.3, 0.05, 0.45), (0.85, 0.06, 0.02, 0.07)])
def test_newcombe_s_interval_covers_the_difference(rows, shares):
    draws = np.random.default_rng(rows).multinomial(rows, shares, size=1000)
    truth = shares[1] - shares[2]
    intervals = [newcombe_interval(pairs(*map(int, one))) for one in draws]
    assert np.mean([low <= truth <= high for low, high in intervals]) >= 0.93


def test_a_model_against_itself_differs_in_at_most_a_twentieth_of_the_draws():
    generator, rows = np.random.default_rng(7), 120
    differs = []
    for _ in range(200):
        right = generator.random(rows) < 0.6
        one, other = (np.where(generator.random(rows) < 0.1, generator.random(rows) < 0.6, right) for _ in range(2))
        counted = Pairs.of(one, other)
        differs.append(
            p_of(counted.only_first, counted.discordant) <= 0.05
            or standing(newcombe_interval(counted), 0.02) in ("better", "worse")
        )
    assert np.mean(differs) <= 0.05


def test_the_quantiles_are_those_of_the_normal_distribution():

    np.testing.assert_allclose([Z, Z_POWER], norm.ppf([0.975, 0.8]), atol=1e-12)
