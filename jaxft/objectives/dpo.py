"""Direct preference optimization: the answers that people chose become more likely than those that they rejected."""

# B batch, S sequence, D documents that a row can hold, P pairs that a row can hold

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.nn.decoder import Decoder
from jaxft.objectives.documents import target_logps, target_statistics
from jaxft.objectives.loss import LossSums, Ratio
from jaxft.objectives.pair_losses import PAIR_LOSSES, PairSettings, divergence_scores
from jaxft.objectives.pairs import (
    PairCounts,
    Pairs,
    answer_sums,
    by_pair,
    chosen_mask,
    pair_sums,
    reward_metrics,
    with_nll,
)
from jaxft.objectives.router import RouterCoefficients, hidden_and_routing, with_router_losses


@dataclass(frozen=True, kw_only=True)
class DPOSettings(PairSettings):
    """What is minimised: a weighted sum of losses of pairs, and the negative log-likelihood of chosen answers.

    losses: (name in PAIR_LOSSES, weight). sft_weight: factor of the mean over the tokens of chosen answers of -log p
    (RPO, arXiv:2404.19733). ld_alpha: see `answer_sums`. use_weighting: each pair counts by its `wpo_weights`.
    divergence, divergence_alpha: see `divergence_scores`.
    """

    losses: tuple[tuple[str, float], ...] = (("sigmoid", 1.0),)
    sft_weight: float = 0.0
    ld_alpha: float | None = None
    use_weighting: bool = False
    divergence: str = "reverse_kl"
    divergence_alpha: float = 0.5


def dpo_terms(ratios: Pairs, lengths: Pairs, settings: DPOSettings) -> jax.Array:
    """The weighted sum of a pair's losses, [B, P].

    ratios: log-ratio of policy to reference of either answer, in nats. lengths: trained tokens of either answer.
    """
    scores = divergence_scores(ratios, settings.divergence, settings.divergence_alpha)
    terms = [weight * PAIR_LOSSES[name](scores, lengths, settings) for name, weight in settings.losses]
    return sum(terms, start=jnp.zeros_like(ratios.chosen))


def wpo_weights(logps: Pairs, log_sum_squares: Pairs, lengths: Pairs) -> jax.Array:
    """The weight of a pair, [B, P], without gradient: how likely the policy is to give its answers itself.

    It is the product over both answers of exp(mean over tokens of log p - log(sum over the vocabulary of p^2)). All
    arguments are sums over the tokens of an answer. Source: WPO, arXiv:2406.11827, eq. 2 and its alignment of weights.
    """
    aligned = jax.tree.map(lambda x, y, n: (x - y) / jnp.maximum(n, 1), logps, log_sum_squares, lengths)
    return jax.lax.stop_gradient(jnp.exp(aligned.chosen + aligned.rejected))


def dpo_loss(
    model: Decoder,
    reference_BD: jax.Array,
    batch: Batch[jax.Array],
    key: jax.Array | None,
    settings: DPOSettings,
    *,
    counts: PairCounts | None = None,
    router: RouterCoefficients | None = None,
) -> LossSums:
    """`dpo_terms` summed over the pairs of a batch; the weight is the number of pairs.

    reference_BD: the reference's log-probability of each document, `answer_logps` with the same ld_alpha, without
    gradient. batch: [B, S]; in each row the documents 1 and 2, 3 and 4, ... are the chosen and the rejected answer of a
    pair, each after its prompt, and weights are 1 on the answers' tokens. counts: see `with_nll`, for
    sft_weight. Metrics have TRL's names and are means over pairs: rewards/chosen and rewards/rejected (beta times the
    log-ratio), rewards/margins, rewards/accuracies, logps/chosen, logps/rejected; with sft_weight also nll_loss, a mean
    over tokens.
    """
    hidden_BSD, routing = hidden_and_routing(model, batch, key, router)
    lengths = by_pair(answer_sums(batch.weights_BS, batch))
    weights_BP = None
    if settings.use_weighting:
        statistics = target_statistics(model, hidden_BSD, batch)
        logps_BS = statistics.logps
        logps, squares = (by_pair(answer_sums(x, batch)) for x in (logps_BS, statistics.log_sum_squares))
        weights_BP = wpo_weights(logps, squares, lengths)
    else:
        logps_BS = target_logps(model, hidden_BSD, batch)
    policy, reference = by_pair(answer_sums(logps_BS, batch, settings.ld_alpha)), by_pair(reference_BD)
    ratios = Pairs(policy.chosen - reference.chosen, policy.rejected - reference.rejected)
    terms_BP = dpo_terms(ratios, lengths, settings)
    rewards = Pairs(settings.beta * ratios.chosen, settings.beta * ratios.rejected)
    weighted_BP = terms_BP if weights_BP is None else terms_BP * weights_BP
    sums = pair_sums(batch, weighted_BP, reward_metrics(rewards, policy))
    if settings.sft_weight:
        mask_BS = chosen_mask(batch)
        sums = with_nll(sums, Ratio(-jnp.sum(logps_BS * mask_BS), jnp.sum(mask_BS)), settings.sft_weight, counts)
    return with_router_losses(sums, router, routing)
