"""The policy loss of a packed batch of sampled answers."""

# B rows, S sequence, P documents that a row can hold

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.nn.decoder import Decoder
from jaxft.objectives.documents import by_position, document_sums, target_logps
from jaxft.objectives.loss import LossSums, Ratio, in_units_of
from jaxft.objectives.policy.surrogate import PolicySettings, importance_correction, policy_terms
from jaxft.objectives.router import RouterCoefficients, hidden_and_routing, with_router_losses
from jaxft.objectives.token_logps import token_statistics

# `Batch.values`: of every answer, its advantage (unless tokens have their own), and its part of the divisor.
ADVANTAGES, UNITS = "advantages", "units"
# `Batch.arrays`: of every token, its log-probability when it was sampled, and under the policy that it counts for.
SAMPLER_LOGPS, OLD_LOGPS = "sampler_logps", "old_logps"


class PolicyCounts(NamedTuple):
    """Sums over the whole batch: the divisor of the loss, and the trained tokens."""

    units: jax.Array
    tokens: jax.Array


def policy_counts(batch: Batch[jax.Array]) -> PolicyCounts:
    """The counts of a batch, for the terms of a loss that are means over other units."""
    return PolicyCounts(jnp.sum(batch.values[UNITS]), jnp.sum(batch.weights_BS))


def policy_logps(model: Decoder, batch: Batch[jax.Array], *, temperature: float) -> jax.Array:
    """The log-probability of every trained token in nats, without dropout, [B, S] float32."""
    hidden_BSD, _ = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS)
    return target_logps(model, hidden_BSD, batch, temperature)


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
    """The surrogate of every trained token, added up; the weight is the sum of the answers' `units`.

    batch: [B, S], each document a prompt with an answer; `values` and `arrays` as named above. Without `old_logps`, the
    policy itself is the one that answers count for, so that all ratios are 1. reference_BS: log-probabilities under the
    reference, if beta is not 0. counts: of the whole batch, if entropy_coef is not 0. Metrics have TRL's names and are
    means over tokens; `sampling/` compares the sampler's log-probabilities with the trainer's.
    """
    hidden_BSD, routing = hidden_and_routing(model, batch, key, router)
    unembed, head, dimensions = model.split_unembed()
    statistics = token_statistics(
        unembed,
        head,
        hidden_BSD,
        batch.targets_BS,
        batch.weights_BS,
        entropy_gradient=settings.entropy_coef > 0,
        temperature=settings.temperature,
        dimensions=dimensions,
    )
    logps_BS, mask_BS = statistics.logps, batch.weights_BS
    old_BS = batch.arrays.get(OLD_LOGPS, jax.lax.stop_gradient(logps_BS))
    sampler_BS = batch.arrays[SAMPLER_LOGPS]
    correction_BS = (
        1.0 if settings.importance_cap is None else importance_correction(old_BS, sampler_BS, settings.importance_cap)
    )
    terms = policy_terms(
        logps_BS,
        old_BS,
        advantages_of(batch),
        mask_BS,
        batch.segments_BS,
        settings,
        reference_BS=reference_BS,
        correction_BS=correction_BS,
    )
    tokens, units = jnp.sum(mask_BS), jnp.sum(batch.values[UNITS])
    total = jnp.sum(terms.loss * scale_of(batch, settings))
    entropies = Ratio(jnp.sum(statistics.entropies), tokens)
    if settings.entropy_coef:
        if counts is None:
            raise ValueError("an entropy bonus needs the counts of the whole batch")
        total -= in_units_of(counts.units, Ratio(jnp.float32(settings.entropy_coef), counts.tokens)) * entropies.total
    difference_BS = jnp.abs(old_BS - sampler_BS) * mask_BS
    metrics = {
        "entropy": entropies,
        "clip_ratio/low_mean": Ratio(jnp.sum(terms.low), tokens),
        "clip_ratio/high_mean": Ratio(jnp.sum(terms.high), tokens),
        "clip_ratio/region_mean": Ratio(jnp.sum(terms.low + terms.high), tokens),
        "sampling/sampling_logp_difference/mean": Ratio(jnp.sum(difference_BS), tokens),
        # Of a micro-batch: the mean over them is reported.
        "sampling/sampling_logp_difference/max": Ratio(jnp.max(difference_BS), jnp.float32(1)),
        "sampling/importance_sampling_ratio/mean": Ratio(jnp.sum(correction_BS * mask_BS), tokens),
    }
    if reference_BS is not None:
        metrics["kl"] = Ratio(jnp.sum(terms.kl), tokens)
    sums = LossSums(
        total=total,
        weight=units,
        tokens=jnp.sum(batch.segments_BS > 0).astype(jnp.float32),
        trained_tokens=tokens,
        metrics=jax.lax.stop_gradient(metrics),
    )
    return with_router_losses(sums, router, routing)


def advantages_of(batch: Batch[jax.Array]) -> jax.Array:
    """The advantage of every token, [B, S]: its own, or that of its answer."""
    if ADVANTAGES in batch.arrays:
        return batch.arrays[ADVANTAGES]
    return by_position(batch.values[ADVANTAGES], batch.segments_BS)


def scale_of(batch: Batch[jax.Array], settings: PolicySettings) -> jax.Array:
    """The factor of every token's loss, [B, S]: for `grpo`, one by the trained tokens of its answer."""
    if settings.loss_type != "grpo":
        return jnp.ones_like(batch.weights_BS)
    counts_BP = jnp.maximum(document_sums(batch.weights_BS, batch.segments_BS), 1)
    return by_position(1 / counts_BP, batch.segments_BS)
