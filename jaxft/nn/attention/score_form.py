"""What families do to the scores of attention before the softmax."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row with nothing to look at (padding) gives numbers and not NaN.
MASKED = -1e30


class ScoreForm(NamedTuple):
    """How scores follow from q and k.

    window: at most so many tokens back, itself included. scale: what q k^T is multiplied by, 1 / sqrt(H) where
    None. softcap: scores s become softcap * tanh(s / softcap).
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


PLAIN = ScoreForm()


def score_scale(form: ScoreForm, head_dim: int) -> float:
    """What q k^T is multiplied by."""
    return head_dim**-0.5 if form.scale is None else form.scale


def cap_scores(scores: jax.Array, softcap: float | None) -> jax.Array:
    """Scores held between -softcap and softcap."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)
