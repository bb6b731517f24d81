"""Examines pairs of a chosen and a rejected answer: what a model could learn from them beside the preference."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.data.batch import Example
from jaxft.errors import counted

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
# The name under which a document carries the margin of its pair.
MARGIN = "margin"
# A share of pairs in which one side is longer is told as a bias from here on, if it is that far from one half by more
# than chance: three standard errors.
BIASED = 0.6
STANDARD_ERRORS = 3.0


@dataclass(frozen=True, kw_only=True)
class PairExamination:
    """Counts of pairs. Lengths are those of the answers alone, in trained tokens.

    count: the number of pairs. chosen, rejected: quantiles of the lengths, by "p0" to "p100"; mean_chosen,
    mean_rejected: their means. chosen_longer, rejected_longer: pairs in which this answer is longer than the other.
    repeated: pairs that occurred before, token for token. both_orders: pairs that also occur the other way round.
    margins: quantiles of the margins, None if all are 0, as they are if rows have none. swapped, level: pairs with a
    margin below and of zero. ties, same: pairs of a list of ranked answers that were left out, because both have the
    same rank or the same text. rows_left_out: rows that gave no pair.
    """

    count: int
    chosen: dict[str, int]
    rejected: dict[str, int]
    mean_chosen: float
    mean_rejected: float
    chosen_longer: int
    rejected_longer: int
    repeated: int
    both_orders: int
    margins: dict[str, float] | None
    swapped: int
    level: int
    ties: int
    same: int
    rows_left_out: int

    @property
    def length_bias(self) -> str | None:
        """Which answers are so often longer that a model could learn length instead: `chosen`, `rejected` or None."""
        decided = self.chosen_longer + self.rejected_longer
        if not decided:
            return None
        share = max(self.chosen_longer, self.rejected_longer) / decided
        by_chance = STANDARD_ERRORS * 0.5 / math.sqrt(decided)
        if share < BIASED or share - 0.5 <= by_chance:
            return None
        return "chosen" if self.chosen_longer > self.rejected_longer else "rejected"


def examine_pairs(examples: Sequence[Example], left_out: Mapping[str, int]) -> PairExamination:
    """The examination of pairs, each of two documents, chosen and rejected. left_out: as `ReadCounts` has it."""
    sides = [example.documents for example in examples]
    lengths = np.array([[int(document.mask.sum()) for document in documents] for documents in sides])
    chosen, rejected = lengths[:, 0], lengths[:, 1]
    orders = Counter((_digest(first), _digest(second)) for first, second in sides)
    margins = np.array([first.values.get(MARGIN, (0.0,))[0] for first, _ in sides])
    given = bool(margins.any())
    return PairExamination(
        count=len(sides),
        chosen=length_quantiles(chosen),
        rejected=length_quantiles(rejected),
        mean_chosen=round(float(chosen.mean()), 2),
        mean_rejected=round(float(rejected.mean()), 2),
        chosen_longer=int((chosen > rejected).sum()),
        rejected_longer=int((chosen < rejected).sum()),
        repeated=len(sides) - len(orders),
        both_orders=sum(count for (first, second), count in orders.items() if (second, first) in orders),
        margins=_quantiles(margins) if given else None,
        swapped=int((margins < 0).sum()),
        level=int((margins == 0).sum()) if given else 0,
        ties=left_out.get("ties", 0),
        same=left_out.get("same", 0),
        rows_left_out=left_out.get("rows", 0),
    )


def _digest(document: Example) -> bytes:
    # Not the tokens themselves: those of all pairs would fill the memory once more.
    return hashlib.blake2b(document.tokens.tobytes(), digest_size=16).digest()


def combine_pairs(parts: Sequence[PairExamination], examples: Sequence[Example]) -> PairExamination | None:
    """One examination of several sets of pairs; None if there are none. examples: the kept ones of all sets."""
    if not parts:
        return None
    left_out = {
        "ties": sum(one.ties for one in parts),
        "same": sum(one.same for one in parts),
        "rows": sum(one.rows_left_out for one in parts),
    }
    return examine_pairs(examples, left_out)


def describe_pairs(pairs: PairExamination) -> str:
    """The examination in a few lines for people."""
    lines = [
        f"{counted(pairs.count, 'pair')}; the chosen answer is longer in {pairs.chosen_longer / pairs.count:.0%} and "
        f"shorter in {pairs.rejected_longer / pairs.count:.0%}, by {pairs.mean_chosen - pairs.mean_rejected:+.1f} "
        "tokens on average",
        *(
            f"{name} answers: {mean:.1f} tokens on average, {_listed(quantiles)}"
            for name, mean, quantiles in (
                ("chosen", pairs.mean_chosen, pairs.chosen),
                ("rejected", pairs.mean_rejected, pairs.rejected),
            )
        ),
    ]
    if pairs.margins:
        lines.append(f"margins: {_listed(pairs.margins)}")
    if left_out := _left_out(pairs):
        lines.append(f"left out: {left_out}")
    return "\n".join(lines)


def pair_warnings(pairs: PairExamination) -> list[str]:
    """What may go wrong with such pairs, and how to mend it."""
    warnings = []
    bias = pairs.length_bias
    if bias:
        side = "longer" if bias == "chosen" else "shorter"
        share = max(pairs.chosen_longer, pairs.rejected_longer) / (pairs.chosen_longer + pairs.rejected_longer)
        warnings.append(
            f"the chosen answer is the {side} one in {share:.0%} of the pairs whose answers differ in length "
            f"({pairs.mean_chosen:.1f} tokens on average, rejected ones {pairs.mean_rejected:.1f}): the model may "
            f"learn to answer {'at length' if bias == 'chosen' else 'briefly'} rather than well. Balance the lengths, "
            "or choose a loss that divides by them."
        )
    if pairs.swapped:
        warnings.append(
            f"in {pairs.swapped:,} of {pairs.count:,} pairs the chosen answer has the lower score (a margin below 0): "
            "check the labels, or leave these rows out"
        )
    if pairs.level:
        warnings.append(f"in {pairs.level:,} of {pairs.count:,} pairs both answers have the same score (a margin of 0)")
    if pairs.both_orders:
        warnings.append(
            f"{pairs.both_orders:,} of {pairs.count:,} pairs also occur the other way round, with the chosen answer "
            "rejected: they cancel each other. Keep one of them"
        )
    if pairs.repeated:
        warnings.append(f"{pairs.repeated:,} of {pairs.count:,} pairs are repetitions of others")
    return warnings


def _left_out(pairs: PairExamination) -> str:
    counts = {
        "pairs of answers of the same rank": pairs.ties,
        "pairs of the same answer": pairs.same,
        "rows without a pair": pairs.rows_left_out,
    }
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def _listed(quantiles: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:,g}" for name, value in quantiles.items())


def length_quantiles(lengths: np.ndarray) -> dict[str, int]:
    """The lengths at QUANTILES, each one that occurs, by "p0" to "p100"."""
    return {name: int(value) for name, value in _quantiles(lengths).items()}


def _quantiles(values: np.ndarray) -> dict[str, float]:
    of_each = np.quantile(values, QUANTILES, method="higher").tolist()
    return {f"p{q * 100:g}": float(value) for q, value in zip(QUANTILES, of_each, strict=True)}
