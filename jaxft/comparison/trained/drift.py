"""How far a tuned model is from its base on texts that have nothing to do with its task: perplexity and divergence."""

# S tokens, V vocabulary

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxft.assets import ASSETS
from jaxft.evaluation.statistics import bca_interval

TEXTS = ASSETS / "probe" / "texts.jsonl"
MOST_BYTES = 2**30  # log-probabilities of the base that are kept in memory; later texts are left out
WORSE = 1.05  # a ratio of perplexities from which on it is called worse

# The log-probabilities of every next token, [S - 1, V] float32 each, of rows of S token ids.
LogProbabilities = Callable[[Sequence[Sequence[int]]], Iterable[np.ndarray]]


def texts_of_probe() -> list[str]:
    """The texts that ship: some of each of many kinds, in words of our own."""
    return [json.loads(line)["text"] for line in TEXTS.read_text(encoding="utf-8").splitlines()]


def few_enough(rows: Sequence[Sequence[int]], vocab: int) -> list[Sequence[int]]:
    """The first rows of token ids whose log-probabilities fit into `MOST_BYTES`, one at least."""
    ends = np.cumsum([4 * vocab * len(row) for row in rows])
    return list(rows[: max(1, int(np.searchsorted(ends, MOST_BYTES, side="right")))])


def drift(rows: Sequence[Sequence[int]], base: LogProbabilities, tuned: LogProbabilities) -> dict[str, Any]:
    """How two models predict the same rows of token ids; the tuned one may have more tokens, which stand behind.

    `perplexity` of either; `ratio` of the two with its 95% `interval`, by texts; `divergence`: KL(base || tuned), the
    mean over the tokens in nats; `lost`: a sentence's part if the interval lies above `WORSE`, else None. The base is
    asked for all rows before the tuned model is, so that they need not be in memory together.
    """
    targets = [np.asarray(row[1:]) for row in rows]
    of_base = [logps_SV.copy() for logps_SV in base(rows)]
    counts = np.array([len(own) for own in targets], np.float64)
    before = np.array([_surprise(logps_SV, own) for logps_SV, own in zip(of_base, targets, strict=True)])
    after, divergences = np.zeros(len(rows)), np.zeros(len(rows))
    for index, logps_SV in enumerate(tuned(rows)):
        after[index] = _surprise(logps_SV, targets[index])
        base_SV = of_base[index].astype(np.float64)
        divergences[index] = np.sum(np.exp(base_SV) * (base_SV - logps_SV[:, : base_SV.shape[1]]))

    def change(indices: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.sum((after - before)[indices], axis=-1) / np.sum(counts[indices], axis=-1)

    every = np.arange(len(rows))
    rates, ratio = (after - before) / counts, float(np.exp(change(every)))
    # Where all texts change alike, every draw of them gives the same.
    ends = None if np.allclose(rates, rates[0]) else bca_interval(every, change)
    interval = [ratio, ratio] if ends is None else [float(np.exp(end)) for end in ends]
    perplexity = {name: float(np.exp(one.sum() / counts.sum())) for name, one in (("base", before), ("tuned", after))}
    worse = f"the perplexity of other texts rose from {perplexity['base']:.3g} to {perplexity['tuned']:.3g}"
    return {
        "texts": len(rows),
        "tokens": int(counts.sum()),
        "perplexity": perplexity,
        "ratio": ratio,
        "interval": interval,
        "divergence": float(divergences.sum() / counts.sum()),
        "lost": worse if len(rows) > 1 and interval[0] > WORSE else None,
    }


def _surprise(logps_SV: np.ndarray, targets_S: np.ndarray) -> float:
    """The sum of the negative log-probabilities of the tokens of a row, in nats."""
    return -float(np.take_along_axis(logps_SV, targets_S[:, None], axis=1).sum())
