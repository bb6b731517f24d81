"""The loss of PPO on a packed batch of sampled answers: that of the policy and that of its critic."""

# B batch, S sequence

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.nn.decoder import Decoder
from jaxft.objectives.documents import target_statistics
from jaxft.objectives.loss import LossSums, Ratio
from jaxft.objectives.policy.loss import OLD_LOGPS, policy_sums
from jaxft.objectives.policy.surrogate import PolicySettings, policy_ratios
from jaxft.objectives.policy.value import with_value_loss
from jaxft.objectives.router import RouterCoefficients, hidden_and_routing, with_router_losses


def ppo_loss(
    model: Decoder,
    values_BS: jax.Array,
    batch: Batch[jax.Array],
    key: jax.Array | None,
    settings: PolicySettings,
    *,
    vf_coef: float = 0.1,
    cliprange_value: float | None = 0.2,
    router: RouterCoefficients | None = None,
) -> LossSums:
    """The clipped surrogate of every sampled token plus vf_coef times the loss of the critic's prediction there.

    values_BS: predictions for the states in which the tokens were sampled. batch: weights are 1 on sampled tokens;
    arrays have the old log-probabilities, the advantages, the old values and the returns. Both losses are divided by
    the trained tokens of the whole batch. settings: with the loss type `dapo`, whose units are tokens, so that
    micro-batches need to know nothing of each other.

    Metrics: those of `policy_sums` and `with_value_loss`, and by TRL's names as means over tokens: loss/policy_avg,
    policy/clipfrac_avg (the share of tokens at which the clip takes the gradient away), policy/approxkl_avg (half the
    squared log-ratio to the old policy) and val/ratio (the ratio to it). Source: arXiv:1707.06347, eq. 7 and 9.
    """
    hidden_BSD, routing = hidden_and_routing(model, batch, key, router)
    statistics = target_statistics(model, hidden_BSD, batch, temperature=settings.temperature)
    sums = policy_sums(statistics, batch, settings)
    mask_BS, old_BS = batch.weights_BS, batch.arrays[OLD_LOGPS]
    ratio_BS = policy_ratios(statistics.logps, old_BS, mask_BS, batch.segments_BS, "token")
    tokens = jnp.sum(mask_BS)
    squares_BS = (statistics.logps - old_BS) ** 2 / 2
    metrics = {
        "loss/policy_avg": Ratio(sums.total, sums.weight),
        "policy/clipfrac_avg": sums.metrics["clip_ratio/region_mean"],
        "policy/approxkl_avg": Ratio(jnp.sum(squares_BS * mask_BS), tokens),
        "val/ratio": Ratio(jnp.sum(ratio_BS * mask_BS), tokens),
    }
    sums = sums._replace(metrics=sums.metrics | metrics)
    sums = with_value_loss(sums, values_BS, batch, vf_coef=vf_coef, cliprange_value=cliprange_value)
    return with_router_losses(sums, router, routing)
