"""The loss of value predictions: how much reward is still to come after each token, learned beside the policy (PPO)."""

# B batch, S sequence

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.objectives.loss import LossSums, Ratio, in_units_of
from jaxft.objectives.policy.denominators import PolicyCounts

# `Batch.arrays`, of tokens: the value that was predicted when the advantages were computed, and what it should be.
VALUES, RETURNS = "values", "returns"


def value_terms(
    values_BS: jax.Array, old_BS: jax.Array, returns_BS: jax.Array, cliprange: float | None
) -> tuple[jax.Array, jax.Array]:
    """(the loss of every prediction; 1 where its clipped form is the larger one, else 0), [B, S] float32 each.

    The loss is max((v - R)^2, (clip(v, v_old - cliprange, v_old + cliprange) - R)^2) / 2, without a clip if cliprange
    is None. values_BS: v. old_BS: v_old, returns_BS: R, both without gradient. Source: the implementation of PPO
    (arXiv:1707.06347) in OpenAI's baselines, as arXiv:2005.12729, section 3, describes it.
    """
    plain_BS = (values_BS - returns_BS) ** 2
    if cliprange is None:
        return plain_BS / 2, jnp.zeros_like(plain_BS)
    clipped_BS = (jnp.clip(values_BS, old_BS - cliprange, old_BS + cliprange) - returns_BS) ** 2
    return jnp.maximum(plain_BS, clipped_BS) / 2, (clipped_BS > plain_BS).astype(jnp.float32)


def with_value_loss(
    sums: LossSums,
    values_BS: jax.Array,
    batch: Batch[jax.Array],
    *,
    vf_coef: float = 0.1,
    cliprange_value: float | None = 0.2,
    counts: PolicyCounts | None = None,
) -> LossSums:
    """`sums` of the policy with vf_coef times the mean of `value_terms` over tokens.

    values_BS: predictions for the states in which the tokens of targets_BS were sampled. batch: with arrays[VALUES] and
    arrays[RETURNS]. counts: of the whole batch; None if this is the whole batch. All tokens count as trained. Metrics,
    means over tokens by TRL's names: loss/value_avg (without vf_coef) and val/clipfrac_avg.
    """
    mask_BS = batch.weights_BS
    terms_BS, clipped_BS = value_terms(values_BS, batch.arrays[VALUES], batch.arrays[RETURNS], cliprange_value)
    tokens, total = jnp.sum(mask_BS), jnp.sum(terms_BS * mask_BS)
    whole = PolicyCounts(sums.weight, tokens) if counts is None else counts
    metrics = {
        "loss/value_avg": Ratio(total, tokens),
        "val/clipfrac_avg": Ratio(jnp.sum(clipped_BS * mask_BS), tokens),
    }
    factor = in_units_of(whole.units, Ratio(jnp.float32(vf_coef), whole.tokens))
    return sums._replace(total=sums.total + factor * total, trained_tokens=tokens, metrics=sums.metrics | metrics)
