"""Reward functions: which ones a run has, the processes that call them, and those that ship with jaxft."""

from jaxft.rollouts.reward_functions.functions import (
    RewardError,
    RewardFunctions,
    Role,
    Scores,
    function_metrics,
    weighted_sum,
)

__all__ = ["RewardError", "RewardFunctions", "Role", "Scores", "function_metrics", "weighted_sum"]
