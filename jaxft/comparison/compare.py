"""`jaxft compare`: is fine-tuning worth it against prompts, on the same held-out rows?"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxft import config as config_module
from jaxft.comparison.costs import Prices, prices_of
from jaxft.comparison.outcome import Results, outcome
from jaxft.comparison.page import write_page
from jaxft.comparison.plan import USUAL_CHOOSERS, USUAL_WAYS, Budget, OutOfTime, Plan, as_json
from jaxft.comparison.prompts import BARE, OWN, SystemPrompt, prompt_tokens
from jaxft.comparison.results import (
    Pair,
    Way,
    pair_bare,
    pair_up,
    smallest_differences,
)
from jaxft.comparison.rivals.cache import AnswerCache, digest_of
from jaxft.comparison.rivals.endpoint import Endpoint
from jaxft.comparison.rivals.local import Examples, Local, Rival
from jaxft.comparison.rivals.models import Memory, base_rival, model_rival, run_rival
from jaxft.comparison.rows import Row, Split, load_rows
from jaxft.comparison.selection import Candidate, Selection, no_examples, select
from jaxft.comparison.trained.curve import more_rows
from jaxft.comparison.trained.drift import drift, few_enough, texts_of_probe
from jaxft.comparison.trained.probe import probed, requests_of, rows_of
from jaxft.comparison.trained.seeds import main_pair, methods_of, seeds_of, sides_of
from jaxft.comparison.trained.training import Trained, Trainer
from jaxft.config import RunConfig
from jaxft.data import tokenizer_of
from jaxft.errors import ConfigError, did_you_mean
from jaxft.evaluation.metrics import Measured
from jaxft.files.atomic import make_folder, write_text
from jaxft.files.run_folder import BASE
from jaxft.files.targets import locked_output, refused_target
from jaxft.home import local_path
from jaxft.runs import folder as run_folders
from jaxft.runs.going_on import going_on
from jaxft.runs.scores.measuring import TRIED, Metrics

RESULT, PAGE = "compare.json", "compare.html"

Say = Callable[[str], None]


def compare(
    config: RunConfig | str | None = None,
    *,
    to: str,
    ways: Sequence[str] = USUAL_WAYS,
    runs: Sequence[str] = (),
    models: Sequence[str] = (),
    choose: Sequence[str] = USUAL_CHOOSERS,
    print_line: Say = lambda line: None,
    **options: Any,
) -> dict[str, Any]:
    """Answers the held-out rows in every way, and says whether tuning is worth it: how much better, at what price.

    config: its rows, metric and base, or its name; None: those of the first of `runs`. to: a folder for the answers,
    compare.json and compare.html, whose first line is the verdict. The same call again generates nothing, and goes on
    after an interruption or where `minutes` ended. runs: folders of tuned models. models: for prompts alone. The other
    options are the fields of `jaxft.comparison.plan.Plan`. Returns the content of compare.json.

    Raises ConfigError for options that contradict each other, a folder that cannot be written, and a number of examples
    that would cut a row; DataError for rows that the metric cannot score.
    """
    known = [field.name for field in fields(Plan)]
    for name in options:
        if name not in known:
            raise ConfigError(f"compare has no option {name!r}.{did_you_mean(name, known)}")
    plan = Plan(to=to, ways=tuple(ways), runs=tuple(runs), models=tuple(models), choose=tuple(choose), **options)
    plan.check()
    return carry_out(plan, config_module.load(config) if isinstance(config, str) else config, print_line)


def carry_out(
    plan: Plan, config: RunConfig | None, say: Say = lambda line: None, budget: Budget | None = None
) -> dict[str, Any]:
    """`compare` of a checked plan. budget: the time that it has, by default `plan.minutes`."""
    if config is None and not plan.runs:
        raise ConfigError("give a config, or a run whose rows, metric and base are taken")
    config = going_on(config or run_folders.run_config(local_path(plan.runs[0])))
    folder = Path(local_path(plan.to))
    if (problem := refused_target(folder)) is not None:
        raise ConfigError(f"--to={plan.to} cannot be written: {problem}")
    make_folder(folder)
    with locked_output(str(folder / RESULT), "jaxft compare"):
        result = _Comparison(config, plan, folder, say, budget or Budget(plan.minutes)).result()
        write_text(folder / RESULT, as_json(result))
        write_page(folder / PAGE, result, hide_rows=plan.hide_rows)
    return result


class _Comparison:
    """The state of one call."""

    def __init__(self, config: RunConfig, plan: Plan, folder: Path, say: Say, budget: Budget) -> None:
        self.config, self.tokenizer = run_folders.dated(config, tokenizer_of(config))
        self.plan, self.say, self.budget, self.folder = plan, say, budget, folder
        self.prices: Prices = prices_of(
            plan.usd_per_hour, plan.prices, plan.endpoint_usd, plan.label_usd, plan.topology
        )
        self.split: Split = load_rows(self.config, self.tokenizer, dev_rows=plan.dev_rows, cluster=plan.cluster)
        if "bare" in plan.ways and not any(row.system for row in self.split.held_out):
            raise ConfigError("--ways: bare leaves out the system message, and no held-out row has one: leave bare out")
        self.metrics = self._checked_metrics()
        self.cache, self.memory = AnswerCache(folder / "answers"), Memory()
        self.selections: list[tuple[Rival, Selection]] = []
        self.references: tuple[str, ...] = ()
        self.runs: dict[str, Path] = {}  # of the tuned ways, by name
        self.trainer: Trainer | None = None
        self.prompted: list[Rival] = []
        self.trained: list[Trained] = []

    def _checked_metrics(self) -> Metrics:
        """The metrics of the config, which can score the rows: what they cannot is told before anything is answered."""
        chooses = "shots" in self.plan.ways or self.plan.prompts is not None
        rows = (*self.split.held_out, *(self.split.dev if chooses else ()))
        metrics = Metrics.of(self.config.eval)
        references = [prompt_tokens(self.tokenizer, row, ())[1] for row in rows]
        metrics.check(references, [row.name for row in rows], [row.question for row in rows[:TRIED]])
        return metrics

    def result(self) -> dict[str, Any]:
        """The content of compare.json."""
        self._say_limits()
        self.prompted = self._prompted()
        prompts = [way for rival in self.prompted for way in self._prompt_ways(rival)]
        tuned = [way for way in map(self._tuned_way, self._tuned()) if way is not None]
        curve = self._curve(tuned)
        ways = self._with_speeds([*prompts, *tuned])
        best = self._best_prompt([way for way in ways if way.side == "prompt"])
        zero = next((way for way in ways if way.side == "prompt" and way.k == 0 and way.system is OWN), None)
        tuned = [way for way in ways if way.side == "tuned"]
        clusters = [row.cluster for row in self.split.held_out] if self.plan.cluster else None
        methods = methods_of(tuned, self.trained)
        sides = sides_of(tuned, best, methods, self.plan.margin, clusters)
        main = main_pair(sides)
        pairs = [one for one in sides if one.trainings is not None]
        pairs += pair_up(tuned, best, zero, self.plan.margin, clusters)
        bare = self._bare(main)
        pairs += [] if bare is None or main is None else pair_bare(bare, main, self.plan.margin, clusters)
        probe = self._probe(main)
        results = Results(
            plan=self.plan,
            split=self.split,
            prices=self.prices,
            metric=self.metrics.names[0],
            ways=[*ways, *([] if bare is None else [bare])],
            pairs=pairs,
            main=main,
            selections=self.selections,
            references=self.references,
            runs=self.runs,
            probe=probe,
            left_out=self.budget.left_out,
        )
        return outcome(results) | {"seeds": seeds_of(methods), "curve": curve}

    def _prompted(self) -> list[Rival]:
        if not {"zero", "shots"} & {*self.plan.ways}:
            return []
        between = self.budget.check
        rivals: list[Rival] = [
            self._base(),
            *(model_rival(path, self.config, self.cache, self.memory, between) for path in self.plan.models),
        ]
        if self.plan.endpoint is not None:
            rivals.append(
                Endpoint(
                    self.plan.endpoint, tokenizer=self.tokenizer, config=self.config, cache=self.cache, between=between
                )
            )
        return rivals

    def _tuned(self) -> list[Rival]:
        if "tuned" not in self.plan.ways:
            return []
        if self.plan.methods:
            self.trainer = Trainer(self.config, self.plan, self.folder, self.budget, self.say)
            self.trained = self.trainer.methods()
        rivals: list[Rival] = []
        for run in [*self.plan.runs, *(str(one.folder) for one in self.trained)]:
            rival = run_rival(run, self.config, self.cache, self.memory, self.budget.check)
            if rival.name in self.runs:
                raise ConfigError(f"--run={run}: another run is called {rival.name} too; rename one of the folders")
            self.runs[rival.name] = Path(local_path(run))
            rivals.append(rival)
        return rivals

    def _bare(self, main: Pair | None) -> Way | None:
        """The tuned model of the verdict without the system message of the rows; None unless it is asked for."""
        if main is None or "bare" not in self.plan.ways:
            return None
        way = self._way(main.first.rival, Candidate(system=BARE), "tuned", ", without the system message")
        return None if way is None else self._with_speed(way)

    def _probe(self, main: Pair | None) -> dict[str, Any] | None:
        """What the tuned model of the verdict forgot against the base; None without `--probe`, and without time."""
        if self.plan.probe is None or main is None:
            return None
        requests = requests_of(self.plan.probe)
        rows = rows_of(requests, self.config.data)
        base = next((rival for rival in self.prompted if rival.kind == "base"), None) or self._base()
        texts = []
        for rival in (base, main.first.rival):
            self.say(f"{rival.name}: {len(rows)} requests of the probe")
            try:
                texts.append([row.text for row in rival.answer(rows, no_examples).rows])
            except OutOfTime:
                self.budget.leave_out(f"{rival.name}: the probe")
                return None
        task = [row.answer for row in (*self.split.train, *self.split.held_out)]
        return probed(requests, texts[0], texts[1], task, self.plan.margin, self._drift(base, main.first.rival))

    def _drift(self, base: Rival, tuned: Rival) -> dict[str, Any] | None:
        """How either predicts other texts, kept; None if one of them is not here, and without time."""
        if not isinstance(base, Local) or not isinstance(tuned, Local):
            return None
        texts = texts_of_probe()
        name = f"drift-{digest_of(base.digest, tuned.digest, texts)}"
        if kept := self.cache.value(name):
            return kept
        try:
            self.budget.check()
        except OutOfTime:
            self.budget.leave_out(f"{tuned.name}: perplexity of other texts")
            return None
        self.say(f"{tuned.name}: {len(texts)} other texts")
        rows = few_enough(base.tokens(texts), len(self.tokenizer.backend))
        value = drift(rows, base.log_probabilities, tuned.log_probabilities)
        self.cache.keep_value(name, value)
        return value

    def _base(self) -> Rival:
        runs = [local_path(run) for run in self.plan.runs]
        between, base = self.budget.check, self.folder / BASE
        return base_rival(self.config, self.tokenizer, runs, self.cache, self.memory, between, base)

    def _curve(self, tuned: Sequence[Way]) -> dict[str, Any] | None:
        """The losses and scores of runs on parts of the rows, which are trained here; None without `--sizes`.

        Their scores are no ways of the comparison: the best of them is not looked for.
        """
        whole = next((way for way in tuned if self.trained and way.rival.name == self.trained[0].name), None)
        if not self.plan.sizes or self.trainer is None or whole is None:
            return None
        all_rows = self.trained[0]
        points = [self._point(all_rows, whole.main.value)]
        for one in self.trainer.sizes(all_rows.summary["steps"]):
            rival = run_rival(str(one.folder), self.config, self.cache, self.memory, self.budget.check)
            way = self._tuned_way(rival)
            points += [] if way is None else [self._point(one, way.main.value)]
        points = sorted(points, key=lambda point: point["rows"])
        return {"method": all_rows.method, "points": points, **more_rows(points)}

    @staticmethod
    def _point(one: Trained, value: float) -> dict[str, Any]:
        summary = one.summary
        return {"rows": one.rows, "steps": summary["steps"], "loss": summary["eval_loss"], "value": value}

    def _prompt_ways(self, rival: Rival) -> list[Way]:
        """Zero-shot and the best prompt of a model, which is chosen on the dev rows, on the held-out rows."""
        alone = len(self.prompted) == 1
        chosen = select(rival, self.split, self.plan, self.budget, self._scores, self._embed, alone=alone)
        self.selections.append((rival, chosen))
        own = Candidate()
        wanted = [own] if "zero" in self.plan.ways else []
        wanted += [] if wanted and chosen.best.name == own.name else [chosen.best]
        ways = [self._way(rival, one, "prompt") for one in wanted]
        return [
            replace(way, dev=next((one.dev for one in chosen.tried if one.name == candidate.name), None))
            for way, candidate in zip(ways, wanted, strict=True)
            if way is not None
        ]

    def _tuned_way(self, rival: Rival) -> Way | None:
        return self._way(rival, Candidate(), "tuned")

    def _way(self, rival: Rival, one: Candidate, side: str, suffix: str = "") -> Way | None:
        """A way on the held-out rows; None if there is no time for it. suffix: of the name of a tuned one."""
        name = f"{rival.name}{suffix}" if side == "tuned" else f"{rival.name}, {one.name}"
        self.say(f"{name}: {len(self.split.held_out):,} held-out rows")
        try:
            examples = one.on_all(self.split)
            answered = rival.answer(self.split.held_out, examples, one.system)
        except OutOfTime:
            self.budget.leave_out(f"{name} on the held-out rows")
            return None
        self.references = answered.references
        measured = self._measure(self.split.held_out, [row.text for row in answered.rows], answered.references)
        self.say(f"{name}: {measured[0].value:.1%} {measured[0].name}")
        return Way(
            name=name,
            side=side,
            rival=rival,
            answered=answered,
            measured=tuple(measured),
            examples=examples,
            system=one.system,
            k=one.k,
        )

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts by the base, for examples by `own`."""
        return next(rival for rival in self.prompted if isinstance(rival, Local)).embed(texts)

    def _scores(self, rival: Rival, rows: Sequence[Row], examples: Examples, system: SystemPrompt) -> Sequence[float]:
        self.say(f"{rival.name}: {len(rows):,} dev rows")
        answered = rival.answer(rows, examples, system)
        return self._measure(rows, [row.text for row in answered.rows], answered.references)[0].values

    def _measure(self, rows: Sequence[Row], texts: Sequence[str], references: Sequence[str]) -> list[Measured]:
        return self.metrics.measure([row.question for row in rows], texts, references)

    def _with_speeds(self, ways: Sequence[Way]) -> list[Way]:
        """The ways with the seconds of a call. Seeds of a method are models of the same shape: one is measured."""
        methods = {one.name: one.method for one in self.trained}
        measured: dict[str, dict[str, Any]] = {}
        out = []
        for way in ways:
            method = methods.get(way.rival.name, way.name)
            if method in measured:
                out.append(replace(way, speed=measured[method]))
                continue
            out.append(self._with_speed(way))
            measured[method] = out[-1].speed
        return out

    def _with_speed(self, way: Way) -> Way:
        """A way with the seconds of a call, unless there is no time to measure them."""
        try:
            self.budget.check()
            return replace(way, speed=way.rival.speed(self.split.held_out, way.examples, way.system))
        except OutOfTime:
            self.budget.leave_out(f"{way.name}: seconds a call")
            return way

    def _best_prompt(self, ways: Sequence[Way]) -> Way | None:
        """The prompted way with the best dev score, in the order of the ways if equal or not measured on dev rows."""
        with_dev = [way for way in ways if way.dev is not None]
        return max(with_dev or ways, key=lambda way: way.dev or 0.0, default=None)

    def _say_limits(self) -> None:
        rows = len(self.split.held_out)
        least = smallest_differences(rows)["0.2"]
        shown = "no difference" if least is None else f"differences of {100 * least:.0f} points or more"
        self.say(f"{rows:,} held-out rows show {shown} between two ways that disagree on a fifth of them")
