"""The entries of compare.json: ways with their figures, pairs of ways, and the rows behind them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxft.comparison.prompts import SystemPrompt
from jaxft.comparison.rivals.local import Answered, Examples, Rival
from jaxft.comparison.rows import Row, Split
from jaxft.comparison.verdict import Compared, Trainings, compare_values
from jaxft.evaluation.metrics import Measured
from jaxft.evaluation.statistics import detectable, holm

CHANGED, LONGEST = 6, 600  # rows that are shown of each change, and characters of a text
DISCORDANT = (0.1, 0.2, 0.3)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way on the held-out rows. side: `prompt` or `tuned`. dev: its score on the dev rows, if it has one."""

    name: str
    side: str
    rival: Rival
    answered: Answered
    measured: tuple[Measured, ...]
    examples: Examples
    system: SystemPrompt
    k: int = 0
    dev: float | None = None
    speed: dict[str, Any] = field(default_factory=dict)

    @property
    def main(self) -> Measured:
        """The metric that the verdict is about."""
        return self.measured[0]

    def summary(self) -> dict[str, Any]:
        """The entry of compare.json; `values` are of the main metric, in the order of the held-out rows."""
        rows = self.answered.rows
        return {
            "name": self.name,
            "side": self.side,
            "kind": self.rival.kind,
            "model": self.rival.name,
            "examples": self.k,
            "dev": self.dev,
            **self.main.summary(),
            "metrics": {one.name: one.summary() for one in self.measured[1:]},
            "prompt_tokens": _mean([row.prompt_tokens for row in rows]),
            "shared_tokens": self.answered.shared_tokens,
            "answer_tokens": _mean([row.answer_tokens for row in rows]),
            "cut_off": sum(row.finish_reason == "length" for row in rows),
            **self.speed,
            "values": list(self.main.per_row),
        }


def _mean(values: Sequence[int]) -> float:
    return round(sum(values) / len(values), 2)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two ways and how they compare: the first less the second.

    trainings: several of one method, of which `first` is the middle one and `compared` is about the average; values:
    their average for each held-out row; method: its name. None and empty for a way of its own.
    """

    first: Way
    second: Way
    compared: Compared
    trainings: Trainings | None = None
    values: tuple[float, ...] = ()
    method: str | None = None

    @property
    def name(self) -> str:
        """What the first side is called among the differences."""
        if self.trainings is None:
            return self.first.name
        return f"{self.method}, average of {self.trainings.count} trainings"


def pair_up(tuned: Sequence[Way], prompt: Way | None, zero: Way | None, margin: float, clusters: Any) -> list[Pair]:
    """Every tuned way against the best prompt and against zero-shot, and the best prompt against zero-shot."""
    wanted = [(one, prompt) for one in tuned] + [(one, zero) for one in [*tuned, prompt] if zero is not prompt]
    return [
        Pair(
            first=first,
            second=second,
            compared=compare_values(
                first.main.values,
                second.main.values,
                passes=first.main.passes and second.main.passes,
                margin=margin,
                clusters=clusters,
                tests=max(1, len(tuned)) if second is prompt else 1,
            ),
        )
        for first, second in wanted
        if first is not None and second is not None
    ]


def pair_bare(bare: Way, main: Pair, margin: float, clusters: Any) -> list[Pair]:
    """The tuned model without its system message against itself with it, and against the best prompt."""
    return [one for other in (main.first, main.second) for one in pair_up([bare], other, None, margin, clusters)]


def pair_summaries(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The entries of compare.json; `p_holm` is adjusted for all of them."""
    adjusted = holm([one.compared.p for one in pairs])
    return [
        {"first": one.name, "second": one.second.name, **one.compared.summary(), "p_holm": p}
        for one, p in zip(pairs, adjusted, strict=True)
    ]


def commonest_answer(references: Sequence[str]) -> dict[str, Any]:
    """The answer that most rows have, and their share: what always saying it would score by exact match."""
    (answer, count), *_ = Counter(text.strip() for text in references).most_common(1)
    return {"answer": answer[:LONGEST], "share": count / len(references)}


def unleaked(split: Split) -> list[int]:
    """The held-out rows whose question does not stand in training, nor nearly."""
    seen = {*split.leaked, *split.near}
    return [index for index, row in enumerate(split.held_out) if row.name not in seen]


def without_leaks(way: Way, split: Split) -> float | None:
    """The main score of a way without the rows that stand in training; None if none does, or all do."""
    kept = unleaked(split)
    if not kept or len(kept) == len(split.held_out):
        return None
    return sum(way.main.values[index] for index in kept) / len(kept)


def both_wrong(first: Way, second: Way) -> float:
    """The share of the rows that neither way has fully right."""
    pairs = zip(first.main.values, second.main.values, strict=True)
    return sum(a < 1 and b < 1 for a, b in pairs) / len(first.main.values)


def changed_rows(tuned: Way, prompt: Way, rows: Sequence[Row]) -> dict[str, list[dict[str, str]]]:
    """Rows that the tuned side has better than the prompted one, and the other way round, the largest change first."""
    change = [a - b for a, b in zip(tuned.main.values, prompt.main.values, strict=True)]
    order = sorted(range(len(rows)), key=lambda index: -abs(change[index]))

    def shown(index: int) -> dict[str, str]:
        return {
            "row": rows[index].name,
            "question": rows[index].question[:LONGEST],
            "reference": tuned.answered.references[index][:LONGEST],
            "prompt": prompt.answered.rows[index].text[:LONGEST],
            "tuned": tuned.answered.rows[index].text[:LONGEST],
        }

    return {
        "tuned_better": [shown(index) for index in order if change[index] > 0][:CHANGED],
        "prompt_better": [shown(index) for index in order if change[index] < 0][:CHANGED],
    }


def smallest_differences(rows: int) -> dict[str, float | None]:
    """The differences that this number of rows shows with a probability of 80%, by the share of rows that disagree."""
    return {f"{share:g}": detectable(rows, share) for share in DISCORDANT}
