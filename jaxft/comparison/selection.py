"""The best prompt of a model: number of examples, their chooser and the system message, chosen on dev rows alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.comparison.examples import Chooser, Embed, choosers
from jaxft.comparison.plan import AUTO_SHOTS, Budget, OutOfTime, Plan
from jaxft.comparison.prompts import OWN, SystemPrompt
from jaxft.comparison.rivals.local import Examples, Rival
from jaxft.comparison.rows import Row, Split
from jaxft.errors import ConfigError, DataError

# The main score of each answer of a rival to rows, with examples and a system message.
Scored = Callable[[Rival, Sequence[Row], Examples, SystemPrompt], Sequence[float]]


def no_examples(row: Row) -> tuple[Row, ...]:
    """Zero-shot."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to prompt. k: examples; chooser: of them, None without any. dev: its mean score on the dev rows."""

    k: int = 0
    chooser: Chooser | None = None
    system: SystemPrompt = OWN
    dev: float | None = None

    @property
    def name(self) -> str:
        """In results: `zero-shot`, or `8 examples (bm25)`, with the name of another system message."""
        shots = "zero-shot" if self.chooser is None else f"{self.k} examples ({self.chooser.name})"
        return f"{shots}, prompt {self.system.name}" if self.system.name else shots

    def examples(self, chooser: Chooser | None = None) -> Examples:
        """What gives the examples of a question. chooser: over other rows than the candidate's own."""
        used = chooser or self.chooser
        return no_examples if used is None else lambda row: used.examples(row, self.k)

    def on_all(self, split: Split) -> Examples:
        """The examples of held-out rows: similar ones are taken from all training rows, fixed ones stay the same."""
        return self.examples(None if self.chooser is None else self.chooser.over(split.train))


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The best candidate by dev rows, and all that were tried. refused: what does not fit, in words."""

    best: Candidate
    tried: tuple[Candidate, ...]
    refused: tuple[str, ...]

    def summary(self, rival: str, rows: int) -> list[dict[str, Any]]:
        """The entries of compare.json."""
        return [
            {"model": rival, "name": one.name, "k": one.k, "value": one.dev, "rows": rows, "chosen": one is self.best}
            for one in self.tried
        ]


def select(
    rival: Rival, split: Split, plan: Plan, budget: Budget, scored: Scored, embed: Embed, *, alone: bool = True
) -> Selection:
    """Tries prompts on the dev rows, cheap ones first, and takes the best; of equal ones the one tried first.

    embed: for examples by `own`. alone: whether no other rival is prompted, so that a single candidate need not be
    tried to be compared with others. What is beyond the time of `budget` is left out. Raises ConfigError for a number
    of examples that was asked for and would cut a row, or is more than there are rows.
    """
    candidates, refused = _candidates(rival, split, plan, embed)
    if len(candidates) == 1 and (alone or not split.dev):
        return Selection(best=candidates[0], tried=(), refused=tuple(refused))
    tried: list[Candidate] = []
    for one in candidates:
        try:
            budget.check()
            values = scored(rival, split.dev, one.examples(), one.system)
        except OutOfTime:
            budget.leave_out(f"{rival.name}: {one.name} on the dev rows")
            continue
        tried.append(Candidate(k=one.k, chooser=one.chooser, system=one.system, dev=sum(values) / len(values)))
    best = max(tried, key=lambda one: one.dev or 0.0, default=candidates[0])
    return Selection(best=best, tried=tuple(tried), refused=tuple(refused))


def _candidates(rival: Rival, split: Split, plan: Plan, embed: Embed) -> tuple[list[Candidate], list[str]]:
    systems = plan.system_prompts()
    out = [Candidate(system=system) for system in systems] if "zero" in plan.ways else []
    refused: list[str] = []
    if "shots" in plan.ways:
        if not split.dev:
            raise ConfigError(
                f"{split.trained} training rows are too few to choose examples on: give more, or --ways=zero,tuned"
            )
        of_dev = choosers(plan.choose, split.examples, split.seed, plan.draws, embed)
        for k in plan.shots or AUTO_SHOTS:
            problem = _problem(rival, split, of_dev, systems, k)
            if problem is not None and plan.shots is not None:
                raise ConfigError(f"--shots={k}: {problem}. Give fewer, or lower eval.max_new_tokens")
            if problem is not None:
                refused.append(f"{rival.name}: {problem}")
                break
            out += [Candidate(k=k, chooser=one, system=system) for system in systems for one in of_dev]
    if not out:
        raise ConfigError(
            f"{rival.name} has nothing to be prompted with: no number of examples fits ({'; '.join(refused)}). Add "
            "zero to --ways"
        )
    return out, refused


def _problem(
    rival: Rival, split: Split, of_dev: Sequence[Chooser], systems: Sequence[SystemPrompt], k: int
) -> str | None:
    """Why k examples cannot stand before every row; None if they can."""
    if k > len(split.examples):
        return f"{k} examples are more than the {len(split.examples)} training rows to take them from"
    for system in systems:
        for one in of_dev:
            candidate = Candidate(k=k, chooser=one, system=system)
            try:
                problem = rival.room(split.dev, candidate.examples(), k, system) or rival.room(
                    split.held_out, candidate.on_all(split), k, system
                )
            except DataError as error:
                return f"{k} examples cannot be rendered: {error}"
            if problem is not None:
                return problem
    return None
