"""Sampled answers, and the settings of policy losses that are compared with TRL: case -> fields of PolicySettings."""

import numpy as np

VOCAB = 48  # of the tiny model
LONGEST = 8  # tokens of an answer
CUT_OFF = 4  # the answer that is taken as cut off

CASES = {
    "first step": {"loss_type": "dapo", "on_policy": True},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "temperature": 0.7},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 11},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.02},
    "luspo by token": {"loss_type": "luspo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    "gspo with kl": {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.02, "beta": 0.2},
    "k3_ratio": {"loss_type": "dapo", "beta": 0.3},
    "k3": {"loss_type": "grpo", "beta": 0.3, "kl_estimator": "k3"},
    "delta": {"loss_type": "bnpo", "delta": 1.4},
    "importance": {"loss_type": "dapo", "importance_cap": 1.3, "beta": 0.1},
    "entropy": {"loss_type": "grpo", "entropy_coef": 0.2},
    "truncated": {"loss_type": "grpo", "mask_truncated_completions": True, "entropy_coef": 0.1},
    "by token": {"loss_type": "dapo", "by_token": True},
}
# The same for RLOOTrainer: arguments of rloo_settings.
RLOO_CASES = {"rloo": {"epsilon": 0.3}, "rloo high": {"epsilon": 0.2, "epsilon_high": 0.6}}


def answers(count=6):
    """[(prompt, answer, mask)]: token ids, and 1 on the tokens of the answer that were sampled."""
    rng = np.random.default_rng(7)
    out = []
    for row in range(count):
        prompt, length = rng.integers(0, VOCAB, 2 + row % 3), int(rng.integers(2, LONGEST + 1))
        mask = np.ones(length, np.int64)
        if row == 2:
            mask[1 : length - 1] = 0  # what a tool wrote
        out.append((prompt, rng.integers(0, VOCAB, length), mask))
    return out


def advantages():
    """Of each answer, [n]; those of its tokens, [n, LONGEST]."""
    of_tokens = np.random.default_rng(8).normal(size=(6, LONGEST)).astype(np.float32)
    return np.array([0.9, -1.1, 0.7, -0.8, 1.3, -0.4], np.float32), of_tokens


def sampler_differences():
    """How the sampler's log-probabilities differ from the trainer's, [n, LONGEST]."""
    return np.random.default_rng(9).normal(scale=0.3, size=(6, LONGEST)).astype(np.float32)


def settings_of(case):
    """Its fields of PolicySettings."""
    return {name: value for name, value in CASES[case].items() if name not in ("on_policy", "by_token")}
