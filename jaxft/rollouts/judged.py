"""Sampled answers with their rewards."""

# n answers

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxft.data.prompts import Prompt
from jaxft.objectives.policy.advantages import reward_metrics
from jaxft.rollouts.reward_functions import RewardFunctions, function_metrics
from jaxft.rollouts.rollout import Rollout


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """The n answers of a rollout in groups, with their rewards.

    rewards: float64 [n], the weighted sum of the reward functions; NaN for an answer that none of them scored.
    by_function: float64 [n] of each function. timeouts: answers that a function did not score in time, by function,
    those among them that were replaced. seconds: that scoring took.
    """

    rollouts: tuple[Rollout, ...]
    rewards: np.ndarray
    by_function: dict[str, np.ndarray]
    timeouts: dict[str, int]
    seconds: float

    @property
    def groups(self) -> np.ndarray:
        """The number of each answer's group, int [n]."""
        return np.array([one.group for one in self.rollouts])

    @property
    def function_metrics(self) -> dict[str, float]:
        """What is logged of each function."""
        return function_metrics(self.by_function, self.timeouts)

    def with_groups(self, numbers: Sequence[int], others: "Judged") -> "Judged":
        """The answers, with those of the groups of these numbers replaced by the groups of `others`, in turn."""
        new = {group: index for index, group in enumerate(numbers)}
        groups, indices = self.groups, range(len(self.rollouts))
        size = len(indices) // len(set(groups.tolist()))
        # Indices into the answers of both, one after another.
        taken = [
            len(indices) + new[group] * size + index % size if group in new else index
            for index, group in zip(indices, groups.tolist(), strict=True)
        ]
        both = [*self.rollouts, *others.rollouts]
        return Judged(
            rollouts=tuple(
                replace(both[index], number=number, group=int(groups[number])) for number, index in enumerate(taken)
            ),
            rewards=np.concatenate([self.rewards, others.rewards])[taken],
            by_function={n: np.concatenate([x, others.by_function[n]])[taken] for n, x in self.by_function.items()},
            timeouts={name: count + others.timeouts[name] for name, count in self.timeouts.items()},
            seconds=self.seconds + others.seconds,
        )

    def metrics(self) -> dict[str, float]:
        """What is logged of the rewards, under TRL's names; nothing if there are none."""
        if not self.by_function:
            return {}
        return reward_metrics(self.rewards, self.groups) | self.function_metrics | {"reward_seconds": self.seconds}


def judge(rollouts: Sequence[Rollout], functions: RewardFunctions | None) -> Judged:
    """The answers with the rewards that the functions give them; none without functions."""
    if functions is None:
        nothing = np.full(len(rollouts), np.nan)
        return Judged(rollouts=tuple(rollouts), rewards=nothing, by_function={}, timeouts={}, seconds=0.0)
    scores = functions.score(
        [one.prompt.messages for one in rollouts],
        [one.text for one in rollouts],
        [one.tokens.tolist() for one in rollouts],
        columns_of([one.prompt for one in rollouts]),
    )
    return Judged(
        rollouts=tuple(rollouts),
        rewards=scores.total,
        by_function=scores.by_function,
        timeouts=scores.timeouts,
        seconds=scores.seconds,
    )


def shared_columns(prompts: Sequence[Prompt]) -> list[str]:
    """The names of the columns that the rows of all prompts have."""
    return sorted(set.intersection(*(set(prompt.columns) for prompt in prompts))) if prompts else []


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Every column of any row, as a list over the prompts; None for rows without it."""
    names = sorted({name for prompt in prompts for name in prompt.columns})
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
