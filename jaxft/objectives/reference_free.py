"""Losses on pairs of answers without a reference model: ORPO, CPO and SimPO."""

# B batch, S sequence, P pairs that a row can hold

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.nn.decoder import Decoder
from jaxft.objectives.documents import target_logps
from jaxft.objectives.loss import LossSums, Ratio
from jaxft.objectives.pair_losses import PairSettings, by_length, odds_ratio, without_reference
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
class CPOSettings(PairSettings):
    """What is minimised: a loss of pairs, and the negative log-likelihood of chosen answers.

    loss_type: see `without_reference`. gamma: the margin of simpo. alpha: factor of the mean over the tokens of chosen
    answers of -log p.
    """

    loss_type: str = "sigmoid"
    gamma: float = 0.0
    alpha: float = 0.0


def cpo_loss(
    model: Decoder,
    batch: Batch[jax.Array],
    key: jax.Array | None,
    settings: CPOSettings,
    *,
    counts: PairCounts | None = None,
    router: RouterCoefficients | None = None,
) -> LossSums:
    """`without_reference` summed over the pairs of a batch; the weight is the number of pairs.

    batch: as for `dpo_loss`. counts: see `with_nll`, for alpha. Metrics have TRL's names: means over pairs
    of rewards/chosen and rewards/rejected (beta times the log-probability; of ipo and simpo its mean over tokens),
    rewards/margins, rewards/accuracies, logps/chosen and logps/rejected (that log-probability); with alpha also
    nll_loss, a mean over tokens.
    """
    hidden_BSD, routing = hidden_and_routing(model, batch, key, router)
    logps_BS = target_logps(model, hidden_BSD, batch)
    logps, lengths = (by_pair(answer_sums(x, batch)) for x in (logps_BS, batch.weights_BS))
    terms_BP = without_reference(settings.loss_type, logps, lengths, settings, settings.gamma)
    shown = by_length(logps, lengths) if settings.loss_type in ("ipo", "simpo") else logps
    rewards = Pairs(settings.beta * shown.chosen, settings.beta * shown.rejected)
    sums = pair_sums(batch, terms_BP, reward_metrics(rewards, shown))
    if settings.alpha:
        sums = with_nll(sums, _nll(logps_BS, chosen_mask(batch)), settings.alpha, counts)
    return with_router_losses(sums, router, routing)


def orpo_loss(
    model: Decoder,
    batch: Batch[jax.Array],
    key: jax.Array | None,
    *,
    beta: float,
    nll_on_prompt: bool = False,
    counts: PairCounts | None = None,
    router: RouterCoefficients | None = None,
) -> LossSums:
    """The mean -log p of chosen tokens, less beta times the mean over pairs of `odds_ratio`; the weight counts pairs.

    batch: as for `dpo_loss`. nll_on_prompt: whether the prompts of chosen answers are among the chosen tokens.
    counts: see `with_nll`; its tokens are counted in the same way. Metrics have TRL's names: means over pairs of
    rewards/chosen and rewards/rejected (beta times the mean log-probability of the answer's tokens), rewards/margins,
    rewards/accuracies, logps/chosen and logps/rejected (that mean), log_odds_chosen and log_odds_ratio (its log s); and
    nll_loss, a mean over tokens. Source: ORPO, arXiv:2403.07691, eq. 6.
    """
    hidden_BSD, routing = hidden_and_routing(model, batch, key, router)
    mask_BS = chosen_mask(batch, with_prompt=nll_on_prompt)
    wanted = batch._replace(weights_BS=jnp.maximum(mask_BS, batch.weights_BS))
    logps_BS = target_logps(model, hidden_BSD, wanted)
    weights_BS = batch.weights_BS
    logps, lengths = (by_pair(answer_sums(x, batch)) for x in (logps_BS * weights_BS, weights_BS))
    means = by_length(logps, lengths)
    odds_BP, ratio_BP = odds_ratio(means)
    rewards = Pairs(beta * means.chosen, beta * means.rejected)
    metrics = reward_metrics(rewards, means) | {"log_odds_chosen": odds_BP, "log_odds_ratio": ratio_BP}
    sums = with_nll(pair_sums(batch, -beta * ratio_BP, metrics), _nll(logps_BS, mask_BS), 1.0, counts)
    return with_router_losses(sums, router, routing)


def _nll(logps_BS: jax.Array, mask_BS: jax.Array) -> Ratio:
    """The sum of -log p under a mask, and the number of its tokens."""
    return Ratio(-jnp.sum(logps_BS * mask_BS), jnp.sum(mask_BS))
