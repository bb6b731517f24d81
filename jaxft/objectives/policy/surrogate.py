"""The clipped surrogates of policy gradients, token by token, as pure functions of log-probabilities."""

# B rows, S sequence, P documents that a row can hold

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.objectives.documents import by_position, document_sums

LossType = Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "luspo"]


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """What is minimised. The fields are those of `method.grpo`; TRL's defaults and names.

    loss_type: `cispo` (arXiv:2506.13585, eq. 4) takes the clipped ratio as a constant factor of the log-probability;
    the others take the clipped surrogate of PPO (arXiv:1707.06347, eq. 7), and differ in what it is divided by
    (`credit.units_of`). importance_sampling_level: `sequence` is GSPO (arXiv:2507.18071, eq. 7), whose ratio is the
    geometric mean over the tokens of an answer. epsilon, epsilon_high, delta: limits of the ratio. beta, kl_estimator:
    of the divergence from the reference. importance_cap: of the correction for the sampler. entropy_coef: of the mean
    entropy of tokens. temperature: divides the logits.
    """

    loss_type: LossType = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: Literal["k3_ratio", "k3"] = "k3_ratio"
    importance_cap: float | None = 2.0
    entropy_coef: float = 0.0
    temperature: float = 1.0


class PolicyTerms(NamedTuple):
    """Values of tokens, [B, S] float32. loss: without gradient where a token is not trained. ratio: of the policies,
    without gradient. kl: the estimate of the divergence from the reference, 0 without one. low, high: whether the clip
    took the gradient away, below and above.
    """

    loss: jax.Array
    ratio: jax.Array
    kl: jax.Array
    low: jax.Array
    high: jax.Array


def policy_terms(
    logps_BS: jax.Array,
    old_BS: jax.Array,
    advantages_BS: jax.Array,
    mask_BS: jax.Array,
    segments_BS: jax.Array,
    settings: PolicySettings,
    *,
    reference_BS: jax.Array | None = None,
    correction_BS: jax.Array | float = 1.0,
) -> PolicyTerms:
    """The loss of every token and what is logged of it.

    logps_BS: under the policy, in nats. old_BS: under the policy that the answers count for, without gradient.
    advantages_BS: of the token. mask_BS: 1 on trained tokens. segments_BS: the document of every position, 0 on
    padding. reference_BS: under the reference; needed if beta is not 0. correction_BS: factor of the surrogate, such as
    `importance_correction`.
    """
    log_ratio_BS = (logps_BS - jax.lax.stop_gradient(old_BS)) * mask_BS
    if settings.importance_sampling_level == "sequence":
        counts_BP = jnp.maximum(document_sums(mask_BS, segments_BS), 1)
        log_ratio_BS = by_position(document_sums(log_ratio_BS, segments_BS) / counts_BP, segments_BS)
    ratio_BS = jnp.exp(log_ratio_BS)
    low, high = 1 - settings.epsilon, 1 + settings.epsilon_high
    if settings.loss_type == "cispo":
        # Its limit is on the ratio itself.
        high = settings.epsilon_high
        factor_BS = jax.lax.stop_gradient(jnp.minimum(ratio_BS, high))
        loss_BS = -factor_BS * advantages_BS * logps_BS
        below_BS = jnp.zeros_like(ratio_BS)
    else:
        limited_BS = ratio_BS if settings.delta is None else jnp.minimum(ratio_BS, settings.delta)
        loss_BS = -jnp.minimum(limited_BS * advantages_BS, jnp.clip(ratio_BS, low, high) * advantages_BS)
        below_BS = ((ratio_BS < low) & (advantages_BS < 0)).astype(jnp.float32)
    above_BS = ((ratio_BS > high) & (advantages_BS > 0)).astype(jnp.float32)
    loss_BS = loss_BS * correction_BS
    kl_BS = jnp.zeros_like(ratio_BS)
    if reference_BS is not None:
        kl_BS = kl_estimate(logps_BS, reference_BS) * mask_BS
        loss_BS = loss_BS + settings.beta * (kl_BS * ratio_BS if settings.kl_estimator == "k3_ratio" else kl_BS)
    return PolicyTerms(
        loss_BS * mask_BS, jax.lax.stop_gradient(ratio_BS), kl_BS, below_BS * mask_BS, above_BS * mask_BS
    )


def kl_estimate(logps: jax.Array, reference: jax.Array) -> jax.Array:
    """The estimator k3 of KL(policy, reference) from tokens of the policy: exp(r) - r - 1, r = reference - logps.

    Source: http://joschu.net/blog/kl-approx.html.
    """
    log_ratio = reference - logps
    return jnp.exp(log_ratio) - log_ratio - 1


def importance_correction(old_BS: jax.Array, sampler_BS: jax.Array, cap: float) -> jax.Array:
    """min(p_old / p_sampler, cap) of every token, without gradient: truncated importance sampling.

    It corrects for a sampler that computes other probabilities than the trainer, such as in bfloat16.
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(old_BS - sampler_BS), cap))
