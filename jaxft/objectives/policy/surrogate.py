"""Surrogates of the policy gradient: the loss of every token, from log-probabilities and advantages alone."""

# B batch, S sequence

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.objectives.documents import by_position, document_sums

LossType = Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "luspo"]
# The log-ratio of two policies that belongs to a token: its own; the mean or the sum over the tokens of its answer.
Level = Literal["token", "sequence", "answer"]
KLEstimator = Literal["k1", "k2", "k3", "k3_ratio"]

# Log-ratios above this limit are constants: their exponentials are far outside of every clip, and in float32 those
# above 88 would be infinite, and their gradients not a number.
LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """What is minimised. Names, meanings and defaults are those of TRL's GRPOTrainer, if not stated otherwise.

    loss_type: `cispo` (MiniMax-M1, arXiv:2506.13585, eq. 4) multiplies log-probabilities with the limited ratio as a
        constant; the others take the clipped surrogate of PPO (arXiv:1707.06347, eq. 7). By the loss type the sum over
        tokens is divided, see `denominators.answer_units`.
    importance_sampling_level: `sequence` is GSPO (arXiv:2507.18071, eq. 5 and 7). `answer`, which TRL's
        GRPOTrainer does not have, is RLOO's: see `rloo_settings`.
    epsilon, epsilon_high: the ratio is clipped to 1 - epsilon and 1 + epsilon_high, None being epsilon. `cispo` limits
        it to epsilon_high itself, and not from below.
    delta: upper limit of the ratio also if the advantage is negative (INTELLECT-2, arXiv:2505.07291).
    beta: factor of the estimated KL divergence from the reference. kl_estimator: see `kl_terms`.
    importance_cap: upper limit of `importance_ratios`; None: no correction. TRL corrects only for vLLM, and by default
        by another rule.
    entropy_coef: factor of the mean entropy over tokens, which is maximised.
    temperature: divides the logits, as when sampling.
    mask_truncated_completions: whether tokens of answers that were cut off are left out.
    max_completion_length: tokens that an answer could have; needed for `dr_grpo`.

    Raises ValueError for values which the loss type cannot do without.
    """

    loss_type: LossType = "dapo"
    importance_sampling_level: Level = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: KLEstimator = "k3_ratio"
    importance_cap: float | None = None
    entropy_coef: float = 0.0
    temperature: float = 1.0
    mask_truncated_completions: bool = False
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError("loss_type='cispo' limits ratios to epsilon_high, which is None: set it, such as to 5.0")
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' divides by max_completion_length, which is None: set it")

    @property
    def upper(self) -> float:
        """The ratio above which it is clipped."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return high if self.loss_type == "cispo" else 1 + high


def rloo_settings(
    *, epsilon: float = 0.2, epsilon_high: float | None = None, temperature: float = 1.0, entropy_coef: float = 0.0
) -> PolicySettings:
    """RLOO's loss: the clipped surrogate of whole answers, whose ratio is the product over their tokens, as in TRL.

    It is a mean over answers. The KL penalty is part of the reward, see `advantages.penalized_rewards`.
    """
    return PolicySettings(
        # A mean over the tokens of an answer, which all have the same surrogate, is that of the answer.
        loss_type="grpo",
        importance_sampling_level="answer",
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        temperature=temperature,
        entropy_coef=entropy_coef,
    )


class SurrogateTerms(NamedTuple):
    """Values of tokens, [B, S] float32.

    loss: what is minimised. ratio: of the policy to the old one. low, high: whether the ratio is outside of the clip,
    below it with a negative or above it with a positive advantage, so that the loss has no gradient.
    """

    loss: jax.Array
    ratio: jax.Array
    low: jax.Array
    high: jax.Array


def policy_ratios(
    logps_BS: jax.Array, old_BS: jax.Array, mask_BS: jax.Array, segments_BS: jax.Array, level: Level
) -> jax.Array:
    """The ratio of the policy to the old one at every token, [B, S]; 1 on padding.

    logps_BS, old_BS: log-probabilities in nats; old_BS has no gradient. mask_BS: 1 on the tokens that count.
    segments_BS: the document of each position, 0 on padding.
    """
    log_ratio_BS = (logps_BS - jax.lax.stop_gradient(old_BS)) * mask_BS
    if level != "token":
        sums_BP = document_sums(log_ratio_BS, segments_BS)
        if level == "sequence":
            sums_BP = sums_BP / jnp.maximum(document_sums(mask_BS, segments_BS), 1)
        log_ratio_BS = by_position(sums_BP, segments_BS)
    return jnp.exp(jnp.minimum(log_ratio_BS, LARGEST_LOG_RATIO))


def surrogate_terms(
    logps_BS: jax.Array, ratio_BS: jax.Array, advantages_BS: jax.Array, settings: PolicySettings
) -> SurrogateTerms:
    """The surrogate of every token. ratio_BS: `policy_ratios`. advantages_BS: of each token, without gradient."""
    upper = settings.upper
    if settings.loss_type == "cispo":
        limited_BS = jax.lax.stop_gradient(jnp.minimum(ratio_BS, upper))
        loss_BS = -limited_BS * advantages_BS * logps_BS
        low_BS = jnp.zeros_like(ratio_BS)
    else:
        lower = 1 - settings.epsilon
        clipped_BS = jnp.clip(ratio_BS, lower, upper)
        if settings.delta is not None:
            ratio_BS = jnp.minimum(ratio_BS, settings.delta)
        loss_BS = -jnp.minimum(ratio_BS * advantages_BS, clipped_BS * advantages_BS)
        low_BS = ((ratio_BS < lower) & (advantages_BS < 0)).astype(jnp.float32)
    high_BS = ((ratio_BS > upper) & (advantages_BS > 0)).astype(jnp.float32)
    return SurrogateTerms(loss_BS, ratio_BS, low_BS, high_BS)


def kl_terms(logps: jax.Array, reference: jax.Array, ratio: jax.Array | float, estimator: KLEstimator) -> jax.Array:
    """An estimate of KL(policy, reference) at every token, from tokens that the policy sampled.

    With r = reference - logps: `k1` is -r, `k2` r^2 / 2, `k3` exp(r) - r - 1 (http://joschu.net/blog/kl-approx.html),
    and `k3_ratio` is `k3` times the ratio of the policy to the one that sampled (DeepSeek-V3.2,
    arXiv:2512.02556), whose gradient, unlike that of `k3`, is on average the gradient of the divergence. In a loss, the
    gradient of `k1` is 0 on average: it belongs into the reward. ratio: of `policy_ratios`.
    """
    log_ratio = reference - logps
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    log_ratio = jnp.minimum(log_ratio, LARGEST_LOG_RATIO)
    k3 = jnp.exp(log_ratio) - log_ratio - 1
    return k3 * ratio if estimator == "k3_ratio" else k3


def importance_ratios(old_BS: jax.Array, sampler_BS: jax.Array, cap: float | None) -> jax.Array:
    """p_old / p_sampler of every token, at most `cap`, without gradient: truncated importance sampling.

    It corrects for a sampler whose probabilities differ from the trainer's, as they do in bfloat16 (Ionides, Truncated
    Importance Sampling, 2008). Both arguments are log-probabilities in nats under the same weights.
    """
    ratio_BS = jnp.exp(jnp.minimum(old_BS - sampler_BS, LARGEST_LOG_RATIO))
    return jax.lax.stop_gradient(ratio_BS if cap is None else jnp.minimum(ratio_BS, cap))
