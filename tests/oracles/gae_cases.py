"""Answers with rewards, values and new predictions of their tokens, for which verl's PPO was recorded."""

import numpy as np

# (tokens of an answer, those among them that an environment wrote)
ANSWERS = ((6, ()), (3, ()), (1, ()), (5, (1, 2)), (4, (2,)))
SETTINGS = {"plain": (1.0, 0.95), "discounted": (0.9, 0.8), "one step": (1.0, 0.0)}
CLIPRANGE = 0.2


def sampled_BT():
    """1 on tokens that were sampled, [B, T]; rows end early and have gaps."""
    mask_BT = np.zeros((len(ANSWERS), max(count for count, _ in ANSWERS)))
    for row, (count, others) in enumerate(ANSWERS):
        mask_BT[row, :count] = 1
        mask_BT[row, list(others)] = 0
    return mask_BT


def arrays():
    """(rewards, values, new predictions of values), [B, T] float64; rewards are 0 on tokens that were not sampled."""
    rng = np.random.default_rng(11)
    shape = sampled_BT().shape
    rewards_BT = rng.normal(0, 0.1, shape) * sampled_BT()
    for row, (count, _) in enumerate(ANSWERS):
        rewards_BT[row, count - 1] += rng.normal()
    values_BT = rng.normal(size=shape)
    return rewards_BT, values_BT, values_BT + rng.normal(0, 0.3, shape)
