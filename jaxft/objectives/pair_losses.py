"""Losses of a pair of answers, as formulas on log-ratios and lengths: the DPO family.

c and r are the log-ratios of policy to reference of the chosen and of the rejected answer, in nats, and s is the
logistic function. With another divergence than the reverse KL, c and r are its scores of them (`divergence_scores`).
"""

# P pairs that a row can hold; arrays may have any shape

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxft.objectives.pairs import Pairs

# The exponent that a score may have at most, so that it is finite in float32.
LARGEST_EXPONENT = 80.0
# The mean log-probability, up to its sign, from which odds are finite in float32.
SMALLEST_NLL = 1e-7


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """beta: the strength of the tie to the reference, or what takes its place. label_smoothing: the probability e that
    the labels of a pair are swapped."""

    beta: float
    label_smoothing: float = 0.0


# (log-ratios or scores, numbers of trained tokens, settings) -> the loss of every pair. All have the same shape.
PairLoss = Callable[[Pairs, Pairs, PairSettings], jax.Array]


def sigmoid(scores: Pairs, lengths: Pairs, settings: PairSettings) -> jax.Array:
    """-(1 - e) log s(beta (c - r)) - e log s(-beta (c - r)).

    Source: DPO, arXiv:2305.18290, eq. 7; for e > 0, conservative DPO (E. Mitchell, "A note on DPO with noisy
    preferences and relationship to IPO", 2023).
    """
    return _smoothed_sigmoid(settings.beta * (scores.chosen - scores.rejected), settings.label_smoothing)


def robust(scores: Pairs, lengths: Pairs, settings: PairSettings) -> jax.Array:
    """(-(1 - e) log s(beta (c - r)) + e log s(-beta (c - r))) / (1 - 2 e), whose mean over swapped labels is that of
    right ones. Source: robust DPO, arXiv:2403.00409.
    """
    margin, e = settings.beta * (scores.chosen - scores.rejected), settings.label_smoothing
    return (-(1 - e) * jax.nn.log_sigmoid(margin) + e * jax.nn.log_sigmoid(-margin)) / (1 - 2 * e)


def hinge(scores: Pairs, lengths: Pairs, settings: PairSettings) -> jax.Array:
    """max(0, 1 - beta (c - r)). Source: SLiC-HF, arXiv:2305.10425, as normalized by RSO, arXiv:2309.06657."""
    return jax.nn.relu(1 - settings.beta * (scores.chosen - scores.rejected))


def ipo(scores: Pairs, lengths: Pairs, settings: PairSettings) -> jax.Array:
    """(c / |c| - r / |r| - 1 / (2 beta))^2, with |c| and |r| the numbers of tokens.

    Source: IPO, arXiv:2310.12036, eq. 17, whose tau is beta; the means over tokens are TRL's reading of it.
    """
    means = by_length(scores, lengths)
    return (means.chosen - means.rejected - 1 / (2 * settings.beta)) ** 2


def exo_pair(scores: Pairs, lengths: Pairs, settings: PairSettings) -> jax.Array:
    """The KL divergence of q = (s(m), s(-m)), with m = beta (c - r), from the labels (1 - e, e); e is above 0.

    Source: EXO, arXiv:2402.00856, eq. 16, for two answers.
    """
    margin, e = settings.beta * (scores.chosen - scores.rejected), settings.label_smoothing
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return jnp.exp(right) * (right - jnp.log1p(-e)) + jnp.exp(wrong) * (wrong - jnp.log(e))


def nca_pair(scores: Pairs, lengths: Pairs, settings: PairSettings) -> jax.Array:
    """-log s(beta c) - (log s(-beta c) + log s(-beta r)) / 2. Source: NCA, arXiv:2402.05369, for a pair."""
    chosen, rejected = settings.beta * scores.chosen, settings.beta * scores.rejected
    away = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * away


def bco_pair(scores: Pairs, lengths: Pairs, settings: PairSettings) -> jax.Array:
    """-log s(beta c) - log s(-beta r). Source: BCO, arXiv:2404.04656, without its
    shift of rewards, as TRL 1.16 has it.
    """
    return -jax.nn.log_sigmoid(settings.beta * scores.chosen) - jax.nn.log_sigmoid(-settings.beta * scores.rejected)


def sppo_hard(scores: Pairs, lengths: Pairs, settings: PairSettings) -> jax.Array:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2.

    Source: SPPO, arXiv:2405.00675, eq. 4.7, with a probability of winning of 1 for the chosen answer and 0 for the
    rejected one.
    """
    half = 0.5 / settings.beta
    return (scores.chosen - half) ** 2 + (scores.rejected + half) ** 2


def apo_zero(scores: Pairs, lengths: Pairs, settings: PairSettings) -> jax.Array:
    """1 - s(beta c) + s(beta r): for chosen answers that are better than the model's. Source: APO, arXiv:2408.06266,
    eq. 7.
    """
    return jax.nn.sigmoid(-settings.beta * scores.chosen) + jax.nn.sigmoid(settings.beta * scores.rejected)


def apo_down(scores: Pairs, lengths: Pairs, settings: PairSettings) -> jax.Array:
    """s(beta c) + 1 - s(beta (c - r)): for chosen answers that are worse than the model's. Source: APO,
    arXiv:2408.06266, eq. 8.
    """
    margin = settings.beta * (scores.chosen - scores.rejected)
    return jax.nn.sigmoid(settings.beta * scores.chosen) + jax.nn.sigmoid(-margin)


def sigmoid_norm(scores: Pairs, lengths: Pairs, settings: PairSettings) -> jax.Array:
    """-log s(beta (c / |c| - r / |r|)), with |c| and |r| the numbers of tokens. Source: Tulu 3, arXiv:2411.15124,
    length-normalized DPO.
    """
    means = by_length(scores, lengths)
    return -jax.nn.log_sigmoid(settings.beta * (means.chosen - means.rejected))


# `DPOConfig.loss_type` names them; its `sft` is a loss of tokens and has no formula here.
PAIR_LOSSES: dict[str, PairLoss] = {
    loss.__name__: loss
    for loss in (
        sigmoid, robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, sigmoid_norm,
    )
}  # fmt: skip


def divergence_scores(ratios: Pairs, divergence: str, alpha: float) -> Pairs:
    """f'(t) up to a constant, with t = exp(log-ratio), of the f-divergence that ties the policy to the reference.

    ratios: log t. divergence: reverse_kl (f' = log t, the log-ratios themselves), forward_kl (1 - 1 / t), js_divergence
    (log(2 t / (1 + t))) or alpha_divergence ((t^(alpha - 1) - 1) / (alpha - 1), alpha not 1). Source: f-DPO,
    arXiv:2309.16240.
    """
    if divergence == "reverse_kl":
        return ratios
    functions: dict[str, Callable[[jax.Array], jax.Array]] = {
        "forward_kl": lambda x: 1 - jnp.exp(jnp.minimum(-x, LARGEST_EXPONENT)),
        "js_divergence": lambda x: jnp.log(2) + jax.nn.log_sigmoid(x),
        "alpha_divergence": lambda x: jnp.expm1(jnp.minimum((alpha - 1) * x, LARGEST_EXPONENT)) / (alpha - 1),
    }
    score = functions[divergence]
    return Pairs(score(ratios.chosen), score(ratios.rejected))


def odds_ratio(means: Pairs) -> tuple[jax.Array, jax.Array]:
    """(log of the odds of the chosen answer over those of the rejected one, its log s), the pair's term of ORPO.

    means: mean log-probability of either answer's tokens, below 0; the odds of an answer with mean x are exp(x) /
    (1 - exp(x)). Source: ORPO, arXiv:2403.07691, eq. 4 and 7.
    """
    # A probability of 1 has infinite odds. It is that of pairs that do not exist, or rounding.
    means = Pairs(*(jnp.minimum(x, -SMALLEST_NLL) for x in means))
    odds = means.chosen - means.rejected - (_log1mexp(means.chosen) - _log1mexp(means.rejected))
    return odds, jax.nn.log_sigmoid(odds)


def without_reference(loss_type: str, logps: Pairs, lengths: Pairs, settings: PairSettings, gamma: float) -> jax.Array:
    """The losses of CPO, and of SimPO: log-probabilities in the place of log-ratios.

    loss_type: sigmoid and hinge are those above on sums; ipo, on means over tokens; simpo: the smoothed sigmoid loss of
    beta (c / |c| - r / |r|) - gamma. Source: CPO, arXiv:2401.08417, eq. 3; SimPO, arXiv:2405.14734, eq. 6.
    """
    if loss_type == "simpo":
        means = by_length(logps, lengths)
        margin = settings.beta * (means.chosen - means.rejected) - gamma
        return _smoothed_sigmoid(margin, settings.label_smoothing)
    return PAIR_LOSSES[loss_type](logps, lengths, settings)


def by_length(values: Pairs, lengths: Pairs) -> Pairs:
    """Sums over tokens as means over them; 0 for pairs that do not exist, which have no tokens."""
    return Pairs(values.chosen / jnp.maximum(lengths.chosen, 1), values.rejected / jnp.maximum(lengths.rejected, 1))


def _smoothed_sigmoid(margin: jax.Array, smoothing: float) -> jax.Array:
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -(1 - smoothing) * right - smoothing * wrong


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x below 0."""
    # Either form loses digits on the other side of -ln 2.
    return jnp.where(x < -jnp.log(2), jnp.log1p(-jnp.exp(x)), jnp.log(-jnp.expm1(x)))
