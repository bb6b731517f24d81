"""Labelled answers, and the settings of KTO that are compared with TRL: case -> fields of `method.kto`."""

import numpy as np

VOCAB = 48  # of the tiny model

CASES = {
    "kto": {"beta": 0.3},
    "weights": {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.5},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "beta": 0.3, "undesirable_weight": 1.2},
    "good alone": {"beta": 0.3, "rows": [0, 2]},
}


def answers(count=5, longest=12):
    """[(prompt, answer, label)]: token ids, and whether the answer is good."""
    rng = np.random.default_rng(5)
    out = []
    for row in range(count):
        prompt = rng.integers(0, VOCAB, 2 + row)
        answer = rng.integers(0, VOCAB, int(rng.integers(2, longest - len(prompt))))
        out.append((prompt, answer, row % 2 == 0))
    return out


def rows_of(case):
    """The answers of a case."""
    every = answers()
    return [every[index] for index in CASES[case].get("rows", range(len(every)))]


def settings_of(case):
    """Its fields of `method.kto`."""
    return {name: value for name, value in CASES[case].items() if name != "rows"}
