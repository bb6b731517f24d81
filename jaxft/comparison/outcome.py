"""The content of compare.json, from everything that a comparison found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxft.comparison.costs import Prices, break_even, prices_of_calls, training_cost
from jaxft.comparison.plan import Plan
from jaxft.comparison.results import (
    Pair,
    Way,
    both_wrong,
    changed_rows,
    commonest_answer,
    pair_summaries,
    smallest_differences,
    unleaked,
    without_leaks,
)
from jaxft.comparison.rivals.local import Rival
from jaxft.comparison.rows import Split
from jaxft.comparison.selection import Selection
from jaxft.comparison.verdict import Evidence, Side, Verdict, compare_values, is_met, judge, parse_requirement
from jaxft.files.run_folder import METRICS
from jaxft.training.log import read_metrics


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that a comparison found.

    main: the pair of the verdict. selections: how prompts were chosen, by model. references: of the held-out rows.
    runs: folders of the tuned ways, by name. probe: its entry. left_out: for lack of time.
    """

    plan: Plan
    split: Split
    prices: Prices
    metric: str
    ways: Sequence[Way]
    pairs: Sequence[Pair]
    main: Pair | None
    selections: Sequence[tuple[Rival, Selection]]
    references: Sequence[str]
    runs: Mapping[str, Path]
    probe: dict[str, Any] | None
    left_out: Sequence[str]


def outcome(results: Results) -> dict[str, Any]:
    """The entries of compare.json."""
    entries = [way.summary() | {"without_leaks": without_leaks(way, results.split)} for way in results.ways]
    for entry in entries:
        entry |= prices_of_calls(entry, results.prices)
    split, plan, main = results.split, results.plan, results.main
    cost = _cost(results, entries)
    verdict = _verdict(results, cost)
    met = None
    if plan.require is not None:
        met = main is not None and is_met(parse_requirement(plan.require), main.compared, plan.margin)
    return {
        "verdict": {"kind": verdict.kind, "sentence": verdict.sentence},
        "require": None if plan.require is None else {"text": plan.require, "met": met},
        "metric": results.metric,
        "settings": plan.settings(),
        "rows": _rows(results),
        "main": None if main is None else _main(main),
        "ways": entries,
        "pairs": pair_summaries(results.pairs),
        "dev": [one for rival, chosen in results.selections for one in chosen.summary(rival.name, len(split.dev))],
        "both_wrong": None if main is None else both_wrong(main.first, main.second),
        "changed": None if main is None else changed_rows(main.first, main.second, split.held_out),
        "without_leaks": None if main is None else _without_leaks(results, main),
        "cost": cost,
        "probe": results.probe,
        "refused": [text for _, chosen in results.selections for text in chosen.refused],
        "left_out": list(results.left_out),
    }


def _main(main: Pair) -> dict[str, Any]:
    """The pair of the verdict. method, runs: whose trainings, and how many, its tuned side is the average of."""
    runs = 1 if main.trainings is None else main.trainings.count
    return {
        "tuned": main.first.name,
        "prompt": main.second.name,
        "method": main.method,
        "runs": runs,
        **main.compared.summary(),
    }


def _rows(results: Results) -> dict[str, Any]:
    split = results.split
    return {
        "held_out": len(split.held_out),
        "dev": len(split.dev),
        "training": split.trained,
        "leaked": list(split.leaked),
        "near": dict(split.near),
        "contradictions": split.contradictions,
        "commonest_answer": commonest_answer(results.references) if results.references else None,
        "looks": len(results.ways),
        "smallest_difference": smallest_differences(len(split.held_out)),
    }


def _without_leaks(results: Results, main: Pair) -> dict[str, Any] | None:
    """The pair of the verdict on the held-out rows that do not stand in training; None if none does, or all do."""
    kept, every = unleaked(results.split), results.split.held_out
    if not kept or len(kept) == len(every):
        return None
    both = (main.values, main.second.main.values)
    sides = [[values[index] for index in kept] for values in both]
    passes = main.trainings is None and main.first.main.passes and main.second.main.passes
    clusters = [every[index].cluster for index in kept] if results.plan.cluster else None
    compared = compare_values(*sides, passes=passes, margin=results.plan.margin, clusters=clusters)
    return {"rows": len(kept), **compared.summary()}


def _cost(results: Results, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    prices, main = results.prices, results.main
    out: dict[str, Any] = {"usd_per_hour": prices.per_hour, "price": prices.source}
    if main is None:
        return out
    by_name = {entry["name"]: entry for entry in entries}
    prompt, tuned = by_name[main.second.name], by_name[main.first.name]
    training = training_cost(results.runs[main.first.rival.name], prices, tuned.get("active_parameters"))
    calls = break_even(training["usd"], prompt["usd_per_1000"], tuned["usd_per_1000"])
    cached = break_even(training["usd"], prompt["usd_per_1000_cached"], tuned["usd_per_1000_cached"])
    told = calls if cached is None else cached
    months = told / results.plan.calls if isinstance(told, float) and results.plan.calls else None
    return out | {
        "training": training,
        "labels_usd": prices.labels,
        "break_even_calls": calls,
        "break_even_calls_cached": cached,
        "months": months,
    }


def _verdict(results: Results, cost: Mapping[str, Any]) -> Verdict:
    main, split = results.main, results.split
    if main is None:
        missing = "" if not results.left_out else f" Left out for lack of time: {'; '.join(results.left_out)}."
        return Verdict(
            kind="one side", sentence=f"Only one side was measured, so there is nothing to compare.{missing}"
        )
    return judge(
        Evidence(
            prompt=_side(main.second),
            tuned=_tuned_side(main),
            compared=main.compared,
            trainings=main.trainings,
            margin=results.plan.margin,
            passes=main.first.main.passes and main.second.main.passes,
            trained=split.trained,
            leaked=len(split.leaked),
            near=len(split.near),
            contradictions=split.contradictions,
            break_even=cost["break_even_calls_cached"] or cost["break_even_calls"],
            months=cost["months"],
            falling=_falling(results.runs[main.first.rival.name]),
            forgot=None if results.probe is None else results.probe["sentence"],
        )
    )


def _falling(run: Path) -> bool | None:
    """Whether the held-out loss of a run fell by 1% or more between its last two evaluations."""
    if not (run / METRICS).is_file():
        return None
    losses = [row["eval_loss"] for row in read_metrics(run) if "eval_loss" in row]
    return losses[-1] < 0.99 * losses[-2] if len(losses) > 1 else None


def _tuned_side(main: Pair) -> Side:
    side = _side(main.first)
    return side if main.trainings is None else replace(side, value=main.trainings.mean)


def _side(way: Way) -> Side:
    name = way.name.removeprefix(f"{way.rival.name}, ") if way.rival.kind == "base" else way.name
    return Side(name=name, value=way.main.value, seconds=way.speed.get("seconds_alone"))
