"""The policy loss of a packed batch of sampled answers: GRPO and its relatives, and the policy's part of PPO."""

# B batch, S sequence, D model, P documents that a row can hold

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.nn.decoder import Decoder
from jaxft.objectives.documents import by_position, existing_documents, target_logps, target_statistics
from jaxft.objectives.loss import LossSums, Ratio, in_units_of
from jaxft.objectives.policy.denominators import (
    PolicyCounts,
    answer_units,
    token_scale,
    without_truncated,
)
from jaxft.objectives.policy.surrogate import (
    PolicySettings,
    SurrogateTerms,
    importance_ratios,
    kl_terms,
    policy_ratios,
    surrogate_terms,
)
from jaxft.objectives.router import RouterCoefficients, hidden_and_routing, with_router_losses
from jaxft.objectives.token_loss import TokenStatistics

# `Batch.values`: the advantage of each answer. `Batch.arrays`: that of each token, which goes before it (PPO).
ADVANTAGES = "advantages"
# `Batch.arrays`, log-probabilities of tokens in nats under the temperature: when they were sampled; under the weights
# that sampled them, by the trainer; under the reference.
SAMPLER_LOGPS, OLD_LOGPS, REFERENCE_LOGPS = "sampler_logps", "old_logps", "reference_logps"


def policy_logps(model: Decoder, batch: Batch[jax.Array], *, temperature: float = 1.0) -> jax.Array:
    """The log-probability of every trained token in nats, without dropout, [B, S] float32."""
    hidden_BSD, _ = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS, whole=batch.whole)
    return target_logps(model, hidden_BSD, batch, temperature=temperature)


def policy_loss(
    model: Decoder,
    batch: Batch[jax.Array],
    key: jax.Array | None,
    settings: PolicySettings,
    *,
    reference_BS: jax.Array | None = None,
    counts: PolicyCounts | None = None,
    router: RouterCoefficients | None = None,
) -> LossSums:
    """`policy_sums` of the model's own log-probabilities and entropies on a batch.

    batch: [B, S]; each document is a prompt with its answer, weights are 1 on sampled tokens, and values and arrays are
    those which `policy_sums` reads. key: as for every loss.
    """
    hidden_BSD, routing = hidden_and_routing(model, batch, key, router)
    statistics = target_statistics(
        model,
        hidden_BSD,
        without_truncated(batch, settings),
        temperature=settings.temperature,
        entropy_gradient=settings.entropy_coef != 0,
    )
    sums = policy_sums(statistics, batch, settings, reference_BS=reference_BS, counts=counts)
    return with_router_losses(sums, router, routing)


def policy_sums(
    statistics: TokenStatistics,
    batch: Batch[jax.Array],
    settings: PolicySettings,
    *,
    reference_BS: jax.Array | None = None,
    counts: PolicyCounts | None = None,
) -> LossSums:
    """The surrogate of all trained tokens plus beta times their KL terms, added up; the weight is their `answer_units`.

    statistics: of every target, [B, S], under the temperature. batch: without arrays[OLD_LOGPS], the old policy is the
    policy itself and all ratios are 1. arrays[SAMPLER_LOGPS] are needed for importance_cap, and to compare the sampler
    with the trainer. reference_BS: the reference's log-probabilities, if the batch does not have them; needed if beta
    is not 0. counts: of the whole batch, for entropy_coef; None if this is the whole batch.

    trained_tokens are those with a gradient: without KL and entropy, tokens whose advantage is 0 have none. Metrics
    have TRL's names and are means over tokens: entropy, kl, clip_ratio/low_mean, clip_ratio/high_mean and
    clip_ratio/region_mean (means over answers if the ratio is that of the answer), or cispo_clip_ratio;
    sampling/sampling_logp_difference/mean, and its max over all tokens; sampling/importance_sampling_ratio/mean.
    Raises ValueError if the batch lacks what the settings need.
    """
    batch = without_truncated(batch, settings)
    mask_BS, logps_BS = batch.weights_BS, statistics.logps
    old_BS = batch.arrays.get(OLD_LOGPS, jax.lax.stop_gradient(logps_BS))
    advantages_BS = token_advantages(batch)
    ratio_BS = policy_ratios(logps_BS, old_BS, mask_BS, batch.segments_BS, settings.importance_sampling_level)
    terms = surrogate_terms(logps_BS, ratio_BS, advantages_BS, settings)
    loss_BS = terms.loss
    tokens = jnp.sum(mask_BS)
    metrics = {"entropy": Ratio(jnp.sum(statistics.entropies), tokens)} | clip_metrics(terms, batch, settings)
    importance_BS, of_sampler, maxima = sampling_terms(old_BS, batch, settings)
    metrics |= of_sampler
    if settings.importance_cap is not None:
        loss_BS = loss_BS * importance_BS
    if reference_BS is None and (settings.beta or REFERENCE_LOGPS in batch.arrays):
        reference_BS = _needed(batch, REFERENCE_LOGPS)
    if reference_BS is not None:
        kl_BS = kl_terms(logps_BS, jax.lax.stop_gradient(reference_BS), ratio_BS, settings.kl_estimator)
        metrics["kl"] = Ratio(jnp.sum(kl_BS * mask_BS), tokens)
        if settings.beta:
            loss_BS = loss_BS + settings.beta * kl_BS
    whole = PolicyCounts(jnp.sum(answer_units(batch, settings)), tokens)
    total = jnp.sum(loss_BS * token_scale(batch, settings))
    trained_BS = mask_BS
    if settings.entropy_coef:
        own = whole if counts is None else counts
        factor = in_units_of(own.units, Ratio(jnp.float32(settings.entropy_coef), own.tokens))
        total = total - factor * jnp.sum(statistics.entropies * mask_BS)
    elif not settings.beta:
        trained_BS = mask_BS * (advantages_BS != 0)
    return LossSums(
        total=total,
        weight=whole.units,
        tokens=jnp.sum(batch.segments_BS > 0).astype(jnp.float32),
        trained_tokens=jnp.sum(trained_BS),
        metrics=metrics,
        maxima=maxima,
    )


def token_advantages(batch: Batch[jax.Array]) -> jax.Array:
    """The advantage of every token, [B, S] float32: its own if the batch has any, otherwise that of its answer."""
    if ADVANTAGES in batch.arrays:
        return batch.arrays[ADVANTAGES]
    if ADVANTAGES not in batch.values:
        raise ValueError(f"the batch has no {ADVANTAGES!r}, neither in its values [B, P] nor in its arrays [B, S]")
    return by_position(batch.values[ADVANTAGES], batch.segments_BS)


def clip_metrics(terms: SurrogateTerms, batch: Batch[jax.Array], settings: PolicySettings) -> dict[str, Ratio]:
    """The shares of tokens, or of answers if they have one ratio, at which the clip takes the gradient away."""
    counted_BS = batch.weights_BS
    units = jnp.sum(counted_BS)
    if settings.importance_sampling_level != "token" and ADVANTAGES not in batch.arrays:
        # The first token of an answer stands for it.
        before_BS = jnp.pad(batch.segments_BS, ((0, 0), (1, 0)))[:, :-1]
        counted_BS = ((batch.segments_BS > 0) & (batch.segments_BS != before_BS)).astype(jnp.float32)
        units = jnp.sum(existing_documents(batch.segments_BS))
    low, high = (Ratio(jnp.sum(x * counted_BS), units) for x in (terms.low, terms.high))
    if settings.loss_type == "cispo":
        return {"cispo_clip_ratio": high}
    return {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": Ratio(low.total + high.total, units),
    }


def sampling_terms(
    old_BS: jax.Array, batch: Batch[jax.Array], settings: PolicySettings
) -> tuple[jax.Array, dict[str, Ratio], dict[str, jax.Array]]:
    """(`importance_ratios` of the tokens, [B, S]; what compares the sampler with the trainer: metrics and maxima).

    Without log-probabilities of the sampler, the ratios are 1 and there is nothing to compare. old_BS: the trainer's.
    """
    if SAMPLER_LOGPS not in batch.arrays and settings.importance_cap is None:
        return jnp.ones_like(old_BS), {}, {}
    mask_BS, sampler_BS = batch.weights_BS, _needed(batch, SAMPLER_LOGPS)
    tokens, difference_BS = jnp.sum(mask_BS), jnp.abs(old_BS - sampler_BS) * mask_BS
    ratio_BS = importance_ratios(old_BS, sampler_BS, settings.importance_cap)
    metrics = {
        "sampling/sampling_logp_difference/mean": Ratio(jnp.sum(difference_BS), tokens),
        "sampling/importance_sampling_ratio/mean": Ratio(jnp.sum(ratio_BS * mask_BS), tokens),
    }
    return ratio_BS, metrics, {"sampling/sampling_logp_difference/max": jnp.max(difference_BS)}


def _needed(batch: Batch[jax.Array], name: str) -> jax.Array:
    if name not in batch.arrays:
        raise ValueError(
            f"the settings of the loss need arrays[{name!r}] of the batch, which has {sorted(batch.arrays)}"
        )
    return batch.arrays[name]
