"""The instances of an environment that a rollout has, in processes of their own."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from jaxft.errors import ConfigError, JaxftError, did_you_mean
from jaxft.rollouts.environments.named import named_environment
from jaxft.rollouts.environments.protocol import Message
from jaxft.rollouts.reward_functions.pool import Call, Pool
from jaxft.sharding.processes import gather, process_share

ROLES = ("user", "tool", "system", "developer")
SHOWN = 200  # characters of a value in an error
Row = Mapping[str, Any]


class EnvironmentFailure(JaxftError):
    """An environment raised, could not start, or returned something else than messages or a reward."""


class Environments:
    """Instances of the class that `rollout.environment` names, each kept in one of `workers` processes.

    A context manager. timeout_seconds: of each call. An instance whose process hangs or dies is lost: it has no more
    turns and no reward. Each process of a run has a part of the instances, and all of them get what every one returns.
    Raises ConfigError for a class that cannot be found.
    """

    def __init__(self, environment: str, *, workers: int = 2, timeout_seconds: float = 60.0) -> None:
        self.named = named_environment(environment)
        self._workers, self._timeout = workers, timeout_seconds
        self._pool = Pool(workers, timeout_seconds)
        self._where: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        self._pool.close()

    def check(self, columns: Sequence[str], row: Row, where: str) -> tuple[Message, ...]:
        """Imports the class, compares its `columns` with those of the rows, and resets an instance with a row.

        Returns the prompt that this instance gave. Raises ConfigError if the class cannot be imported, has not all
        methods, or needs a column that the rows do not have; EnvironmentFailure if `reset` fails.
        """
        call = self._call("load class", 0, {})
        self._pool.run([call])
        if call.outcome != "ok":
            late = f"its import took longer than rewards.timeout_seconds={self._timeout:g}"
            died = f"its process ended with exit code {call.result}"
            why = {"timeout": late, "died": died}.get(call.outcome or "", call.result)
            raise ConfigError(f"{self._name} cannot be imported: {why}")
        if call.result["missing"]:
            raise ConfigError(
                f"{self._name} has no method {', '.join(call.result['missing'])}: an environment has reset(row), "
                "step(completion) and reward()"
            )
        missing = [name for name in call.result["columns"] if name not in columns]
        if missing:
            hints = "".join(did_you_mean(name, columns) for name in missing)
            raise ConfigError(
                f"{self._name} needs {', '.join(map(repr, missing))}, and the rows have no such column; they have "
                f"{', '.join(sorted(columns)) or 'none but the prompt'}.{hints}"
            )
        trial = self._call("reset", 0, {"key": -1, "row": row, "keep": False})
        self._pool.run([trial])
        return tuple(self._prompt(trial, where))

    def reset(self, rows: Sequence[Row], where: Sequence[str]) -> list[tuple[Message, ...]]:
        """Starts an instance for every row; returns their prompts.

        where: the names of the rows in errors. Instances of an earlier call are forgotten. A row whose process hangs or
        dies is started once more; EnvironmentFailure names it if that fails too.
        """
        self._where = list(where)

        def own(indices: Sequence[int]) -> list[list[Any]]:
            calls = {i: self._call("reset", i, {"key": i, "row": rows[i], "keep": True}) for i in indices}
            self._pool.run(list(calls.values()))
            broken = {call.seat for call in calls.values() if call.outcome in ("timeout", "died")}
            # The process that took the place of another one does not have its instances.
            again = {i: self._call("reset", i, call.arguments) for i, call in calls.items() if call.seat in broken}
            self._pool.run(list(again.values()))
            return [[i, self._prompt(call, self._where[i])] for i, call in (calls | again).items()]

        prompts = self._shared(range(len(rows)), own)
        return [tuple(prompts[i]) for i in range(len(rows))]

    def step(self, completions: Mapping[int, str]) -> dict[int, tuple[Message, ...] | None]:
        """What follows the turns of some instances, by the number of their row; None for those that are lost."""

        def own(indices: Sequence[int]) -> list[list[Any]]:
            calls = {i: self._call("step", i, {"key": i, "completion": completions[i]}) for i in indices}
            self._pool.run(list(calls.values()))
            return [
                [i, None if self._is_lost(call) else self._messages(call, self._where[i])] for i, call in calls.items()
            ]

        replies = self._shared(list(completions), own)
        return {i: None if messages is None else tuple(messages) for i, messages in replies.items()}

    def rewards(self, indices: Sequence[int]) -> dict[int, tuple[float | None, bool]]:
        """(the reward, whether the instance is lost) of some instances, which end with this."""

        def own(indices: Sequence[int]) -> list[list[Any]]:
            calls = {i: self._call("reward", i, {"key": i}) for i in indices}
            self._pool.run(list(calls.values()))
            return [
                [i, [None, True] if self._is_lost(call) else [self._reward(call, self._where[i]), False]]
                for i, call in calls.items()
            ]

        return {i: (reward, lost) for i, (reward, lost) in self._shared(list(indices), own).items()}

    @property
    def _name(self) -> str:
        return f"the environment {self.named.name} of {self.named.source}"

    def _call(self, kind: Any, index: int, arguments: Mapping[str, Any]) -> Call:
        seat = index % self._workers
        return Call(kind=kind, source=self.named.source, name=self.named.name, arguments=arguments, seat=seat)

    def _shared(self, indices: Sequence[int], own: Callable[[Sequence[int]], list[list[Any]]]) -> dict[int, Any]:
        """What `own` gives for the instances of this process and, in the others, for theirs.

        An error of one process is raised in all of them.
        """
        mine = process_share(len(self._where))
        try:
            outcome: list[Any] = [own([i for i in indices if i in mine]), None]
        except EnvironmentFailure as error:
            outcome = [[], str(error)]
        parts = gather(outcome)
        for _, failure in parts:
            if failure is not None:
                raise EnvironmentFailure(failure)
        return dict(sorted((i, value) for values, _ in parts for i, value in values))

    @staticmethod
    def _is_lost(call: Call) -> bool:
        return call.outcome in ("timeout", "died") or call.result == ["unknown"]

    def _prompt(self, call: Call, where: str) -> list[Message]:
        if call.outcome == "timeout":
            raise EnvironmentFailure(
                f"{where}: {self._name} took longer than rewards.timeout_seconds={self._timeout:g} in reset(), so "
                "there is no prompt. Raise the limit or make it faster."
            )
        if call.outcome == "died":
            raise EnvironmentFailure(
                f"{where}: the process of {self._name} ended in reset() (exit code {call.result}). A negative code is "
                "the number of a signal; -9 may be a lack of memory."
            )
        messages = self._messages(call, where, of_prompt=True)
        if not messages or messages[-1]["role"] == "assistant":
            what = "no message" if not messages else "messages that end in one of the assistant"
            raise EnvironmentFailure(
                f"{where}: {self._name} returned {what} from reset(); the model must have something to answer"
            )
        return messages

    def _messages(self, call: Call, where: str, *, of_prompt: bool = False) -> list[Message]:
        method = call.kind
        value = self._value(call, where)
        roles = (*ROLES, "assistant") if of_prompt else ROLES
        if not isinstance(value, list):
            raise EnvironmentFailure(
                f"{where}: {self._name} returned {_shown(call)} from {method}(). It must return a list of messages, "
                "each a dict with role and content."
            )
        for message in value:
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                raise EnvironmentFailure(
                    f"{where}: {self._name} returned a list with {repr(message)[:SHOWN]} from {method}(). Each message "
                    "is a dict with role and content, both text."
                )
            if message.get("role") not in roles:
                raise EnvironmentFailure(
                    f"{where}: {self._name} returned a message of role {message.get('role')!r} from {method}(). Roles "
                    f"are {', '.join(roles)}; what the assistant says is sampled from the model."
                )
        return value

    def _reward(self, call: Call, where: str) -> float | None:
        value = self._value(call, where)
        if isinstance(value, str) or (value is not None and not math.isfinite(value)):
            raise EnvironmentFailure(
                f"{where}: {self._name} returned {value} from reward(). It must be a finite number, or None if the "
                "conversation is not scored."
            )
        return value

    def _value(self, call: Call, where: str) -> Any:
        """What a method returned; text in place of what JSON does not hold."""
        if call.outcome == "error":
            raise EnvironmentFailure(f"{where}: {self._name} raised in {call.kind}():\n{call.result}")
        return call.result[1]


def _shown(call: Call) -> str:
    kind, value = call.result
    return str(value) if kind == "repr" else repr(value)[:SHOWN]
