"""Sampled answers with their rewards."""

# n answers

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxft.data.prompts import Prompt
from jaxft.objectives.policy.advantages import reward_metrics
from jaxft.rollouts.environments.episode import REWARD
from jaxft.rollouts.reward_functions import RewardFunctions, function_metrics, weighted_sum
from jaxft.rollouts.rollout import Rollout

REWARD_MODEL = "reward_model"  # the name of a reward model among the reward functions


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelScores:
    """The scores of n answers by a reward model, float64 [n], NaN for an answer that it could not read.

    weight: their factor in the reward. seconds: that scoring took.
    """

    values: np.ndarray
    weight: float
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """The n answers of a rollout in groups, with their rewards.

    rewards: float64 [n], the weighted sum of the scores by functions, by the reward model, and by the environment with
    weight 1, less the penalty of an answer that was cut off; NaN for an answer that none of them scored. by_function:
    float64 [n] of each of them. timeouts: answers that a function did not score in time, by function,
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

    def metrics(self, *, compared: bool = True) -> dict[str, float]:
        """What is logged of the rewards, under TRL's names; nothing if there are none.

        compared: whether rewards are compared within groups, so that groups without a difference are counted.
        """
        if not self.by_function:
            return {}
        of_rewards = reward_metrics(self.rewards, self.groups)
        if not compared:
            of_rewards = {name: x for name, x in of_rewards.items() if name != "frac_reward_zero_std"}
        return of_rewards | self.function_metrics | {"reward_seconds": self.seconds}


def judge(
    rollouts: Sequence[Rollout],
    functions: RewardFunctions | None,
    *,
    model: ModelScores | None = None,
    missing_eos_penalty: float | None = None,
) -> Judged:
    """The answers with the rewards that functions, a reward model and their environment give them, if there are any.

    missing_eos_penalty: taken from the reward of each answer that was cut off.
    """
    by_function: dict[str, np.ndarray] = {}
    timeouts: dict[str, int] = {}
    weights: dict[str, float] = {}
    seconds = 0.0
    if functions is not None:
        scores = functions.score(
            [one.prompt.messages for one in rollouts],
            [one.text for one in rollouts],
            [one.tokens.tolist() for one in rollouts],
            columns_of([one.prompt for one in rollouts]),
            messages=[None if one.episode is None else one.episode.messages for one in rollouts],
        )
        by_function, timeouts, seconds = dict(scores.by_function), dict(scores.timeouts), scores.seconds
        weights = {one.name: one.weight for one in functions.functions}
    episodes = [one.episode for one in rollouts if one.episode is not None]
    if episodes:
        by_function[REWARD] = np.array([np.nan if one.reward is None else one.reward for one in episodes], np.float64)
        timeouts[REWARD], weights[REWARD] = sum(one.lost for one in episodes), 1.0
    if model is not None:
        by_function[REWARD_MODEL], timeouts[REWARD_MODEL] = model.values, 0
        weights[REWARD_MODEL], seconds = model.weight, seconds + model.seconds
    rewards = weighted_sum(by_function, weights) if by_function else np.full(len(rollouts), np.nan)
    if missing_eos_penalty is not None:
        rewards = rewards - missing_eos_penalty * np.array([one.finish_reason != "stop" for one in rollouts])
    return Judged(
        rollouts=tuple(rollouts), rewards=rewards, by_function=by_function, timeouts=timeouts, seconds=seconds
    )


def shared_columns(prompts: Sequence[Prompt]) -> list[str]:
    """The names of the columns that the rows of all prompts have."""
    return sorted(set.intersection(*(set(prompt.columns) for prompt in prompts))) if prompts else []


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Every column of any row, as a list over the prompts; None for rows without it."""
    names = sorted({name for prompt in prompts for name in prompt.columns})
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
