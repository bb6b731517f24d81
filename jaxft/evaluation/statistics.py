"""What a difference between two ways of answering the same rows means: intervals, tests, and how many rows it takes."""

# N rows, B bootstrap draws

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Z = 1.959963984540054  # 97.5 % point of the normal distribution
Z_POWER = 0.8416212335729143  # its 80 % point
DRAWS = 10_000
MOST_ROWS = 100_000  # numbers of rows above it are not told

Interval = tuple[float, float]
# From values, [..., N], and the axis of the rows, to a number for each of the other axes.
Statistic = Callable[..., Any]


def wilson_interval(correct: int, total: int, z: float = Z) -> Interval:
    """The confidence interval of the share of right answers, given `correct` of `total`; 95% by default.

    Unlike the normal interval it stays inside [0, 1] and has a width at 0 and at total.
    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953. Raises ValueError unless
    0 <= correct <= total and total > 0.
    """
    if not (0 <= correct <= total and total > 0):
        raise ValueError(f"{correct} right answers of {total} is no share")
    share, widening = correct / total, z * z / total
    center = (share + widening / 2) / (1 + widening)
    half = z / (1 + widening) * math.sqrt(share * (1 - share) / total + widening / (4 * total))
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """How the same rows were answered in two ways: rows that both, only one, or neither of them got right."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool | float], second: Sequence[bool | float]) -> "Pairs":
        """Counts rows, [N] each. Raises ValueError if the lengths differ or there are no rows."""
        a, b = np.asarray(first, bool), np.asarray(second, bool)
        if a.shape != b.shape or not a.size:
            raise ValueError(f"{a.size} and {b.size} rows are not pairs")
        return cls(
            both=int((a & b).sum()),
            only_first=int((a & ~b).sum()),
            only_second=int((~a & b).sum()),
            neither=int((~a & ~b).sum()),
        )

    @property
    def total(self) -> int:
        """All rows."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def discordant(self) -> int:
        """Rows that exactly one of the two ways got right."""
        return self.only_first + self.only_second

    @property
    def difference(self) -> float:
        """The share that the first way got right, less that of the second."""
        return (self.only_first - self.only_second) / self.total


def mcnemar(pairs: Pairs) -> float:
    """The two-sided p-value of the exact McNemar test that both ways are right equally often; 1 if they never differ.

    Source: McNemar 1947, doi:10.1007/BF02295996; exact: a binomial test of the discordant rows at 1/2.
    """
    from scipy.stats import binomtest

    if not pairs.discordant:
        return 1.0
    return float(binomtest(pairs.only_first, pairs.discordant, 0.5).pvalue)


def newcombe_interval(pairs: Pairs, z: float = Z) -> Interval:
    """The interval of the difference of two shares on the same rows; 95% by default.

    Source: Newcombe 1998, doi:10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C, method 10: Wilson's
    intervals of both shares, joined by their correlation, which is corrected towards zero if it is positive.
    """
    n = pairs.total
    first, second = pairs.both + pairs.only_first, pairs.both + pairs.only_second
    p, q = first / n, second / n
    (p_low, p_high), (q_low, q_high) = wilson_interval(first, n, z), wilson_interval(second, n, z)
    phi, d = _correlation(pairs), pairs.difference
    below = (p - p_low) ** 2 - 2 * phi * (p - p_low) * (q_high - q) + (q_high - q) ** 2
    above = (q - q_low) ** 2 - 2 * phi * (q - q_low) * (p_high - p) + (p_high - p) ** 2
    return max(-1.0, d - math.sqrt(max(0.0, below))), min(1.0, d + math.sqrt(max(0.0, above)))


def _correlation(pairs: Pairs) -> float:
    a, b, c, d = pairs.both, pairs.only_first, pairs.only_second, pairs.neither
    product = (a + b) * (c + d) * (a + c) * (b + d)
    if not product:
        return 0.0
    over = a * d - b * c
    corrected = max(0.0, over - pairs.total / 2) if over > 0 else over
    return corrected / math.sqrt(product)


def bca_interval(
    values: Sequence[float] | np.ndarray,
    statistic: Statistic = np.mean,
    *,
    clusters: Sequence[Any] | None = None,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval | None:
    """The bias-corrected and accelerated bootstrap interval of a statistic of rows, [N]; None if it has none.

    statistic: called with resampled rows, [..., N], and `axis=-1`. clusters: of each row, its group: groups are then
    drawn in place of rows, for the mean alone. There is no interval for fewer than two rows, and for values that are
    all the same, of which every draw gives the same.
    Source: Efron 1987, doi:10.1080/01621459.1987.10478410, as `scipy.stats.bootstrap` computes it.
    """
    from scipy.stats import bootstrap

    data = np.asarray(values)
    if clusters is not None:
        return _cluster_interval(data, clusters, level=level, draws=draws, seed=seed)
    if len(data) < 2 or np.all(data == data[0]):
        return None
    ends = bootstrap(
        (data,),
        statistic,
        vectorized=True,
        axis=-1,
        n_resamples=draws,
        batch=max(1, 4_000_000 // len(data)),
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = float(ends.low), float(ends.high)
    return None if math.isnan(low) or math.isnan(high) else (low, high)


def _cluster_interval(
    values: np.ndarray, clusters: Sequence[Any], *, level: float, draws: int, seed: int
) -> Interval | None:
    """The interval of the mean of all rows if whole groups are drawn: of the ratio of sums and sizes of groups."""
    groups = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    of_row = np.array([groups[name] for name in clusters])
    sums = np.bincount(of_row, weights=values, minlength=len(groups))
    sizes = np.bincount(of_row, minlength=len(groups))

    def ratio(numbers: np.ndarray, axis: int = -1) -> np.ndarray:
        return sums[numbers].sum(axis) / sizes[numbers].sum(axis)

    if np.all(sums / sizes == sums[0] / sizes[0]):
        return None
    return bca_interval(np.arange(len(groups)), ratio, level=level, draws=draws, seed=seed)


def permutation_p(differences: Sequence[float] | np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> float:
    """The two-sided p-value that differences of rows, [N], are as often positive as negative in sum: signs are drawn.

    Source: Fisher 1935's randomisation test, with the observed signs counted as one draw.
    """
    d = np.asarray(differences, np.float64)
    generator, observed, as_far = np.random.default_rng(seed), abs(d.sum()), 0
    at_once = max(1, 4_000_000 // len(d))
    for start in range(0, draws, at_once):
        signs = generator.integers(0, 2, (min(at_once, draws - start), len(d))) * 2 - 1
        as_far += int((np.abs(signs @ d) >= observed - 1e-12).sum())
    return (as_far + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, adjusted so that one false finding among all has the probability of each.

    Source: Holm 1979, https://www.jstor.org/stable/4615733.
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


Standing = Literal["better", "worse", "equal", "open"]


def standing(interval: Interval, margin: float) -> Standing:
    """What the interval of a difference says: better or worse by more than the margin, equal within it, or nothing.

    `better` needs the whole interval at or above the margin, `equal` the whole interval inside of +-margin.
    """
    low, high = interval
    if low >= margin:
        return "better"
    if high <= -margin:
        return "worse"
    return "equal" if -margin < low and high < margin else "open"


def rows_needed(difference: float, variance: float, margin: float) -> int | None:
    """About how many rows would show, with a probability of 80 %, on which side of the margin a difference lies.

    difference: the one that was seen. variance: of the difference of one row. None above `MOST_ROWS`. By the normal
    approximation: the distance to the margin is then the sum of both quantiles in standard errors.
    """
    distance = abs(abs(difference) - margin)
    if distance * distance * MOST_ROWS < (Z + Z_POWER) ** 2 * variance:
        return None
    return max(2, math.ceil((Z + Z_POWER) ** 2 * variance / distance**2))


def detectable(rows: int, discordant: float, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest difference of two shares that the exact McNemar test finds with this power; None if it finds none.

    rows: answered in both ways. discordant: the share of them that exactly one way gets right.
    """
    from scipy.stats import binom

    k = np.arange(rows + 1)
    weights = binom.pmf(k, rows, discordant)
    k, weights = k[weights > 1e-9], weights[weights > 1e-9]
    # The most rows of the smaller side, of k discordant ones, that are still as unlikely as alpha.
    limits = binom.ppf(alpha / 2, k, 0.5)
    limits = np.where(binom.cdf(limits, k, 0.5) > alpha / 2, limits - 1, limits)

    def power_at(thousandths: int) -> float:
        share = (discordant + thousandths / 1000) / (2 * discordant)
        rejected = binom.cdf(limits, k, share) + binom.sf(k - limits - 1, k, share)
        return float((weights * np.where(limits >= 0, rejected, 0.0)).sum())

    most = int(discordant * 1000)
    if power_at(most) < power:
        return None
    return bisect_left(range(1, most + 1), power, key=power_at) / 1000 + 0.001
