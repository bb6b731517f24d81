"""The rewards of sampled answers, by functions that run in processes of their own."""

# n answers

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from jaxft.errors import ConfigError, JaxftError, did_you_mean
from jaxft.rollouts.reward_functions.named import Named, named_functions
from jaxft.rollouts.reward_functions.pool import Call, Pool
from jaxft.sharding.processes import gather, process_share

GIVEN = ("prompts", "completions", "completion_ids")
Prompt = str | Sequence[Mapping[str, Any]]


class RewardError(JaxftError):
    """A reward function failed: it raised, its process died, or it returned no rewards."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """What functions are for, in messages.

    what: a function is, and `noun` what it returns. answers: which it scores. none: what it may return beside numbers.
    setting: of the seconds that it may take.
    """

    what: str = "reward function"
    noun: str = "reward"
    answers: str = "a rollout"
    none: str = ", or None for an answer that it does not score"
    setting: str = " (rewards.timeout_seconds)"


REWARD = Role()


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The rewards of n answers.

    by_function: of each function, float64 [n]; NaN for an answer that it did not score. total: their weighted sum, [n],
    without those that are NaN; NaN for an answer that no function scored. timeouts: answers that a function did not
    score because it took too long, by function. seconds: that scoring took.
    """

    by_function: dict[str, np.ndarray]
    total: np.ndarray
    timeouts: dict[str, int]
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Means and deviations under TRL's names, over the answers that were scored; and the timeouts, if any."""
        return function_metrics(self.by_function, self.timeouts)


def function_metrics(by_function: Mapping[str, np.ndarray], timeouts: Mapping[str, int]) -> dict[str, float]:
    """What is logged of each function's rewards, [n]: see `Scores`."""
    metrics: dict[str, float] = {}
    for name, values in by_function.items():
        scored = values[~np.isnan(values)]
        metrics[f"rewards/{name}/mean"] = float(scored.mean()) if len(scored) else 0.0
        metrics[f"rewards/{name}/std"] = float(scored.std(ddof=1)) if len(scored) > 1 else 0.0
        metrics[f"rewards/{name}/unscored"] = float(len(values) - len(scored))
        metrics[f"rewards/{name}/timeouts"] = float(timeouts[name])
    return metrics


def weighted_sum(by_function: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The rewards of answers, [n]: the weighted sum of the scores without those that are NaN; NaN if all are."""
    weighted = np.stack([weights[name] * values for name, values in by_function.items()])
    return np.where(np.isnan(weighted).all(axis=0), np.nan, np.nansum(weighted, axis=0))


class RewardFunctions:
    """The functions of `rewards.functions`, each called in one of `workers` processes; a context manager.

    completions: whether functions get an answer to messages as `text`, or as a list with one assistant message. role:
    for messages. Raises ConfigError for functions that cannot be imported. The processes start with `check`, or the
    first answers.
    """

    def __init__(
        self,
        functions: str,
        *,
        workers: int = 2,
        timeout_seconds: float = 60.0,
        completions: Literal["text", "messages"] = "text",
        role: Role = REWARD,
    ) -> None:
        self.functions, self._role = named_functions(functions), role
        self._completions, self._workers = completions, workers
        self._timeout = timeout_seconds
        self._pool = Pool(workers, timeout_seconds)
        self._parameters: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        self._pool.close()

    def check(self, columns: Sequence[str]) -> None:
        """Imports every function and compares its parameters with the columns of the rows.

        Raises ConfigError if a function cannot be imported, takes nothing by name, or needs a column that the rows do
        not have.
        """
        calls = [Call(kind="load", source=one.source, name=one.name) for one in self.functions]
        self._pool.run(calls)
        for one, call in zip(self.functions, calls, strict=True):
            if call.outcome != "ok":
                late = f"its import took longer than {self._timeout:g} s{self._role.setting}"
                why = late if call.outcome == "timeout" else call.result
                raise ConfigError(f"{self._where(one)} cannot be imported: {why}")
            self._parameters[one.name] = call.result
            if not call.result["names"] and not call.result["any"]:
                raise ConfigError(
                    f"{self._where(one)} takes nothing by name, and is called by name, with completions=[...] and the "
                    "columns of the rows: give it such parameters, without a slash after them"
                )
            missing = [name for name in call.result["needed"] if name not in (*GIVEN, *columns)]
            if missing:
                hints = "".join(did_you_mean(name, columns) for name in missing)
                raise ConfigError(
                    f"{self._where(one)} needs {', '.join(map(repr, missing))}, and the rows "
                    f"have no such column; they have {', '.join(sorted(columns)) or 'none but the prompt'}.{hints} Add "
                    "the column, or give the parameter a default."
                )

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        *,
        messages: Sequence[Sequence[Mapping[str, Any]] | None] | None = None,
        alone: bool = False,
    ) -> Scores:
        """The rewards of n answers, in their order.

        prompts: text or messages. completions: text of each answer, without stop tokens. completion_ids: its token ids.
        columns: of the rows, [n] each. messages: of answers that are conversations, None of others, which are one
        message; for functions that get messages. Several processes of a run each score a part of the answers, and then
        have all rewards, unless this one scores all of them `alone`. Raises RewardError, naming the function, if it
        raises, if its process dies twice, or if it returns anything but one number or None for each answer.
        """
        started = time.monotonic()
        if not self._parameters:
            self.check(list(columns))
        whole = messages or [None] * len(completions)
        given = [self._completion(*one) for one in zip(prompts, completions, whole, strict=True)]
        known = {"prompts": list(prompts), "completions": given, "completion_ids": [*map(list, completion_ids)]}
        own = range(len(prompts)) if alone else process_share(len(prompts))
        outcome = self._outcome({**columns, **known}, own)
        parts = [self._checked(part) for part in ([outcome] if alone else gather(outcome))]
        by_function = {
            one.name: np.array([_nan(x) for part, _ in parts for x in part[one.name]], np.float64)
            for one in self.functions
        }
        late = {one.name: sum(part[one.name] for _, part in parts) for one in self.functions}
        return Scores(
            by_function=by_function,
            total=weighted_sum(by_function, {one.name: one.weight for one in self.functions}),
            timeouts=late,
            seconds=time.monotonic() - started,
        )

    def _completion(self, prompt: Prompt, text: str, messages: Sequence[Mapping[str, Any]] | None) -> Any:
        if self._completions == "text" or isinstance(prompt, str):
            return text
        return [{"role": "assistant", "content": text}] if messages is None else [*map(dict, messages)]

    def _outcome(self, arguments: Mapping[str, Sequence[Any]], rows: range) -> list[Any]:
        """What `_own_scores` gives, or the message of its error: the other processes wait for either."""
        try:
            return [*self._own_scores(arguments, rows), None]
        except RewardError as error:
            return [{}, {}, str(error)]

    @staticmethod
    def _checked(outcome: list[Any]) -> tuple[dict[str, list[float | None]], dict[str, int]]:
        values, timeouts, error = outcome
        if error is not None:
            raise RewardError(error)
        return values, timeouts

    def _own_scores(
        self, arguments: Mapping[str, Sequence[Any]], rows: range
    ) -> tuple[dict[str, list[float | None]], dict[str, int]]:
        """(rewards of these rows, rows that were not scored in time), both by function."""
        cuts = [cut for cut in np.array_split(np.array(rows, int), self._workers) if len(cut)]
        calls = [(one, cut, self._call(one, arguments, cut)) for one in self.functions for cut in cuts]
        self._pool.run([call for _, _, call in calls])
        values: dict[str, list[float | None]] = {one.name: [] for one in self.functions}
        timeouts = dict.fromkeys(values, 0)
        for one, cut, call in calls:
            if call.outcome == "timeout":
                timeouts[one.name] += len(cut)
                values[one.name] += [None] * len(cut)
            else:
                values[one.name] += self._rewards(one, call, cut)
        return values, timeouts

    def _call(self, one: Named, arguments: Mapping[str, Sequence[Any]], rows: np.ndarray) -> Call:
        takes = self._parameters[one.name]
        wanted = [name for name in arguments if takes["any"] or name in takes["names"]]
        own = {name: [arguments[name][row] for row in rows] for name in wanted}
        return Call(source=one.source, name=one.name, arguments=own)

    def _rewards(self, one: Named, call: Call, rows: np.ndarray) -> list[float | None]:
        where, answers = self._where(one), self._role.answers
        if call.outcome == "died":
            raise RewardError(
                f"{where}: its process died twice (exit code {call.result}) on the answers {rows[0]} to {rows[-1]} of "
                f"{answers}. A negative code is the number of a signal; -9 may be a lack of memory."
            )
        if call.outcome == "error":
            raise RewardError(f"{where} cannot be called:\n{call.result}")
        returned, failure = call.result
        if failure is not None:
            row, text = failure
            one_answer = row is not None and row >= 0
            if row is None:
                which = f"on the answers {rows[0]} to {rows[-1]} of {answers}, or on one of them"
            elif one_answer:
                which = f"on answer {rows[row]} of {answers}"
            else:
                which = "on several answers, but on none of them alone"
            shown = ""
            if one_answer and "completions" in call.arguments:
                shown = f" Its completion is {str(call.arguments['completions'][row])[:200]!r}."
            raise RewardError(f"{where} raised {which}.{shown}{self._hint(text)}\n{text}")
        if not isinstance(returned, list) or len(returned) != len(rows):
            count = f"{len(returned)} rewards" if isinstance(returned, list) else f"a value of type {returned}"
            raise RewardError(
                f"{where} returned {count} for {len(rows)} answers. It must return a list with one number for each "
                f"answer{self._role.none}."
            )
        return [self._reward(where, value) for value in returned]

    def _where(self, one: Named) -> str:
        return f"{self._role.what} {one.name} of {one.source}"

    def _hint(self, text: str) -> str:
        if self._completions == "text" and "string indices must be integers" in text:
            return (
                " Completions are text here. If the function expects a list with a message, as TRL gives it, set "
                "rewards.completions='messages'."
            )
        if self._completions == "messages" and "'list' object has no attribute" in text:
            return (
                " Completions are lists with a message here. If the function expects text, set "
                "rewards.completions='text'."
            )
        return ""

    def _reward(self, where: str, value: float | str | None) -> float | None:
        if isinstance(value, str) or (value is not None and not math.isfinite(value)):
            raise RewardError(
                f"{where} returned {value} as a {self._role.noun}. It must be a finite number{self._role.none}."
            )
        return value


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
