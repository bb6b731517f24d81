"""Rewards of groups of answers, and the settings of advantages that are compared with TRL."""

import numpy as np

GENERATIONS = 4
NAN = float("nan")
# Three groups: scored in full, with an answer that was not scored, and with none but one scored.
REWARDS = np.array([1.0, 0.25, -0.5, 2.0, 0.7, NAN, 0.1, 0.3, NAN, NAN, 1.5, NAN], np.float32)
# Case -> arguments of group_advantages or leave_one_out, and beta of RLOO's penalty.
GRPO = {"group": "group", "batch": "batch", "none": "none"}
RLOO = {"plain": {}, "normalized": {"normalize": True}, "penalized": {"beta": 0.3}}


def log_ratios():
    """Policy less reference of each answer's two tokens, [n, 2]."""
    return np.random.default_rng(3).normal(size=(len(REWARDS), 2)).astype(np.float32)
