"""The metrics of a config, on answers: those of `evaluation/metrics`, and functions of the user's."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.config import EvalConfig
from jaxft.errors import ConfigError, DataError, listed
from jaxft.evaluation import metrics
from jaxft.evaluation.json_answers import load_schema
from jaxft.evaluation.metrics import METRICS, Measured, Settings
from jaxft.files.digest import content_digest
from jaxft.rollouts.reward_functions import RewardError, RewardFunctions, Role
from jaxft.rollouts.reward_functions.named import Named, named_functions

COLUMN = "reference"  # under which a function gets the right answers
WORKERS, TIMEOUT_SECONDS, NAMED = 2, 60.0, 10
TRIED = 2  # rows on which a function is tried before the model answers any
ROLE = Role(what="metric", noun="score", answers="the held-out rows", none="", setting="")


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The metrics of `eval.metric`, in order, and what they read."""

    names: tuple[str, ...]
    settings: Settings

    @classmethod
    def of(cls, config: EvalConfig) -> "Metrics":
        """Those of a config.

        Raises ConfigError for a schema that cannot be read, a library that is absent, and a function without its file.
        """
        for name in config.metrics:
            metrics.require(name)
            if name not in METRICS:
                _named(name)
        schema = None if config.schema is None else load_schema(config.schema)
        return cls(names=config.metrics, settings=Settings(schema=schema, pattern=config.pattern))

    def check(self, references: Sequence[str], names: Sequence[str] = (), prompts: Sequence[str] = ()) -> None:
        """Raises DataError for references that nothing can be compared with, ConfigError for functions that fail.

        Functions are tried on the first references, as if they were answers. names: of their rows, in messages.
        prompts: of the first rows, which functions may read.
        """
        for metric in self.names:
            if metric in METRICS:
                metrics.check(metric, references, names, settings=self.settings)
            else:
                _try(metric, prompts, references[:TRIED])

    def measure(self, prompts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> list[Measured]:
        """Every metric of N answers; prompts, [N], are for functions. Raises as `check` does, and RewardError."""
        return [
            metrics.measure(name, answers, references, self.settings)
            if name in METRICS
            else _by_function(name, prompts, answers, references)
            for name in self.names
        ]

    def content(self) -> list[object]:
        """What measured values depend on beside answers and references: names, schema, pattern, code of functions."""
        code = [content_digest(one.source) for name in self.names if name not in METRICS for one in _named(name)]
        schema = self.settings.schema
        return [list(self.names), None if schema is None else schema.value, self.settings.pattern, code]


def _named(metric: str) -> tuple[Named, ...]:
    try:
        return named_functions(metric)
    except ConfigError as error:
        raise ConfigError(str(error).replace("rewards.functions", "eval.metric")) from error


def _function(metric: str) -> RewardFunctions:
    return RewardFunctions(metric, workers=WORKERS, timeout_seconds=TIMEOUT_SECONDS, role=ROLE)


def _try(metric: str, prompts: Sequence[str], references: Sequence[str]) -> None:
    """Calls a function once. Raises ConfigError if it cannot be called so, or gives no number for an answer."""
    given = [prompts[row] if row < len(prompts) else "" for row in range(len(references))]
    with _function(metric) as function:
        function.check([COLUMN])
        try:
            scores = function.score(given, references, [[] for _ in given], {COLUMN: list(references)}, alone=True)
        except RewardError as error:
            raise ConfigError(f"eval.metric, tried on references in place of answers: {error}") from error
    if np.isnan(scores.total).any():
        raise ConfigError(
            f"eval.metric, tried on references in place of answers: {metric} gave no number within {TIMEOUT_SECONDS:g} "
            "s. A metric scores every answer: return a number for each."
        )


def _by_function(metric: str, prompts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> Measured:
    with _function(metric) as function:
        ids: list[list[int]] = [[] for _ in answers]
        scores = function.score(prompts, answers, ids, {COLUMN: list(references)})
    (values,) = scores.by_function.values()
    if missing := np.flatnonzero(np.isnan(values)).tolist():
        late = sum(scores.timeouts.values())
        raise DataError(
            f"eval.metric: {metric} gave no score to {len(missing)} of {len(answers)} held-out answers (rows "
            f"{listed(missing, NAMED)}); {late} of them took longer than {TIMEOUT_SECONDS:g} s. A metric scores "
            "every answer: return a number for each."
        )
    name = metric.rpartition(":")[2]
    passes = bool(np.isin(values, (0.0, 1.0)).all())
    return Measured(name=name, values=tuple(values.tolist()), passes=passes)
