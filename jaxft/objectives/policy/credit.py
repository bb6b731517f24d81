"""What sampled answers are credited with, computed on the host from the rewards of the whole rollout."""

# n answers

from typing import Literal

import numpy as np

from jaxft.objectives.policy.surrogate import LossType

EPSILON = 1e-4  # added to deviations, as in TRL


def group_advantages(
    rewards: np.ndarray, groups: np.ndarray, scale: Literal["group", "batch", "none"] = "group"
) -> np.ndarray:
    """How each answer's reward differs from the mean of its group, float64 [n] (GRPO, arXiv:2402.03300, section 4.1.2).

    rewards: float64 [n], NaN for an answer that was not scored: it is left out of its group's mean and deviation, and
    its advantage is 0. groups: int [n]. scale: the difference is divided by the deviation of the rewards (n - 1 in the
    divisor) in the group or in the whole batch, or not at all (Dr. GRPO, arXiv:2503.20783). The advantages of a group
    whose rewards are all alike are exactly 0.
    """
    scored = ~np.isnan(rewards)
    everywhere = _deviation(rewards[scored])
    out = np.zeros(len(rewards))
    for group in np.unique(groups):
        members = np.flatnonzero((groups == group) & scored)
        own = rewards[members]
        if len(own) < 2 or np.all(own == own[0]):
            continue
        deviation = {"group": _deviation(own), "batch": everywhere, "none": 1 - EPSILON}[scale]
        out[members] = (own - own.mean()) / (deviation + EPSILON)
    return out


def leave_one_out(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Each answer's reward less the mean of the others in its group, float64 [n] (RLOO, arXiv:2402.14740, eq. 8).

    The arguments are those of `group_advantages`; an answer that was not scored, or alone, has advantage 0.
    """
    out = np.zeros(len(rewards))
    for group in np.unique(groups):
        members = np.flatnonzero((groups == group) & ~np.isnan(rewards))
        own = rewards[members]
        if len(own) > 1:
            out[members] = own - (own.sum() - own) / (len(own) - 1)
    return out


def alike_groups(rewards: np.ndarray, groups: np.ndarray) -> list[int]:
    """The groups whose scored answers all have the same reward, and those with fewer than two scored answers."""
    out = []
    for group in np.unique(groups):
        own = rewards[(groups == group) & ~np.isnan(rewards)]
        if len(own) < 2 or np.all(own == own[0]):
            out.append(int(group))
    return out


def units_of(loss_type: LossType, lengths: np.ndarray, max_completion_length: int) -> np.ndarray:
    """Each answer's part of the number by which the batch's loss is divided, float64 [n].

    lengths: trained tokens of each answer. `dapo`, `bnpo` and `cispo`: its tokens; `grpo` and `luspo`: 1; `dr_grpo`:
    max_completion_length.
    """
    if loss_type in ("dapo", "bnpo", "cispo"):
        return lengths.astype(np.float64)
    return np.full(len(lengths), float(max_completion_length) if loss_type == "dr_grpo" else 1.0)


def _deviation(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
