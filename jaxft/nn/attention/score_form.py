"""Attention scores before the softmax: scale, soft cap and window, which differ between families."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a query without visible keys (padding) does not give NaN.
MASKED = -1e30


class ScoreForm(NamedTuple):
    """How scores are computed from q and k.

    window: the number of latest tokens that a token sees, including itself; None for all. scale: factor on q k^T, None
    for 1 / sqrt(H). softcap: scores s become softcap * tanh(s / softcap).
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


PLAIN = ScoreForm()


def score_scale(form: ScoreForm, head_dim: int) -> float:
    """The factor on q k^T."""
    return head_dim**-0.5 if form.scale is None else form.scale


def cap_scores(scores: jax.Array, softcap: float | None) -> jax.Array:
    """softcap * tanh(scores / softcap), between -softcap and softcap; the scores themselves if softcap is None."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)
