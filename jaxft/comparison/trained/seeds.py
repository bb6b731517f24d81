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
    """The entries of compare.json, by method: the mean and the range of the scores of its trainings.

    `ways`: their names; `shown`: the one whose costs and changed rows stand for all.
    """
    return {
        one.name: {
            "runs": at.count,
            "mean": at.mean,
            "low": at.low,
            "high": at.high,
            "ways": [way.name for way in one.ways],
            "shown": one.middle.name,
        }
        for one, at in ((method, method.trainings) for method in methods)
    }


def sides_of(
    tuned: Sequence[Way], prompt: Way | None, methods: Sequence[Method], margin: float, clusters: Sequence[Any] | None
) -> list[Pair]:
    """Every run of its own and every method against the best prompt; none if one side is missing.

    A method counts with the average of its trainings, row by row, and is shown by the one in the middle: the best of
    several trainings, if it is looked for on the held-out rows, is better there than on any others. Intervals allow
    for the number of runs and methods among which the best is looked for. clusters: as of `compare_values`.
    """
    if prompt is None:
        return []
    averaged = {way.name for method in methods for way in method.ways}
    alone = [way for way in tuned if way.name not in averaged]

    def pair(way: Way, values: tuple[float, ...], passes: bool, **trained: Any) -> Pair:
        compared = compare_values(
            values,
            prompt.main.values,
            passes=passes,
            margin=margin,
            clusters=clusters,
            tests=len(alone) + len(methods),
        )
        return Pair(first=way, second=prompt, compared=compared, values=values, **trained)

    return [
        *(pair(way, tuple(way.main.values), way.main.passes and prompt.main.passes) for way in alone),
        *(pair(one.middle, one.values, False, trainings=one.trainings, method=one.name) for one in methods),
    ]


def main_pair(sides: Sequence[Pair]) -> Pair | None:
    """The pair of the verdict: of `sides_of`, the one that is furthest ahead; None if there is none."""
    return max(sides, key=lambda one: one.compared.difference, default=None)
