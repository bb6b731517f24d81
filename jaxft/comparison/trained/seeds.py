"""Several trainings of one method: the verdict is about their average, and not about the luckiest of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.comparison.results import Pair, Way
from jaxft.comparison.trained.training import Trained
from jaxft.comparison.verdict import Trainings, compare_values


@dataclass(frozen=True, kw_only=True)
class Method:
    """The trainings of one method, and how all of them compare with the best prompt."""

    name: str
    ways: tuple[Way, ...]

    @property
    def values(self) -> tuple[float, ...]:
        """The mean score of each held-out row over the trainings, [N]."""
        return tuple(np.mean([way.main.values for way in self.ways], axis=0).tolist())

    @property
    def middle(self) -> Way:
        """The training whose score is nearest to the average of all."""
        mean = np.mean([way.main.value for way in self.ways])
        return min(self.ways, key=lambda way: abs(way.main.value - mean))

    @property
    def trainings(self) -> Trainings:
        """How far the scores of the trainings lie apart."""
        scores = [way.main.value for way in self.ways]
        return Trainings(count=len(scores), mean=sum(scores) / len(scores), low=min(scores), high=max(scores))


def methods_of(tuned: Sequence[Way], trained: Sequence[Trained]) -> list[Method]:
    """The methods that were trained more than once. tuned: ways of runs, by whose names `trained` knows them."""
    by_name = {way.rival.name: way for way in tuned}
    ways: dict[str, list[Way]] = {}
    for one in trained:
        if one.name in by_name:
            ways.setdefault(one.method, []).append(by_name[one.name])
    return [Method(name=method, ways=tuple(own)) for method, own in ways.items() if len(own) > 1]


def seeds_of(methods: Sequence[Method]) -> dict[str, dict[str, Any]]:
    """The entries of compare.json, by method: the mean and the range of the scores of its trainings."""
    return {
        one.name: {"runs": at.count, "mean": at.mean, "low": at.low, "high": at.high}
        for one, at in ((method, method.trainings) for method in methods)
    }


def main_pair(
    tuned: Sequence[Way], prompt: Way | None, methods: Sequence[Method], margin: float, clusters: Sequence[Any] | None
) -> Pair | None:
    """The pair of the verdict: the best of runs and methods against the best prompt; None if one side is missing.

    A method counts with the average of its trainings, row by row, and is shown by the one in the middle: the best of
    several trainings, if it is looked for on the held-out rows, is better there than on any others. The interval allows
    for the number of runs and methods among which the best was looked for. clusters: as of `compare_values`.
    """
    if prompt is None:
        return None
    several = {way.name for method in methods for way in method.ways}
    alone = [way for way in tuned if way.name not in several]
    tests = len(alone) + len(methods)

    pairs = [
        Pair(
            first=way,
            second=prompt,
            compared=compare_values(
                values,
                prompt.main.values,
                passes=trainings is None and way.main.passes and prompt.main.passes,
                margin=margin,
                clusters=clusters,
                tests=tests,
            ),
            trainings=trainings,
            values=values,
        )
        for way, values, trainings in [
            *((way, tuple(way.main.values), None) for way in alone),
            *((method.middle, method.values, method.trainings) for method in methods),
        ]
    ]
    return max(pairs, key=lambda one: one.compared.difference, default=None)
