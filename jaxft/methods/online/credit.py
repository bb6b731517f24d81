"""What each token of a rollout's answers is worth, by a critic: token rewards, advantages and returns (PPO)."""

# n answers, t tokens of an answer

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxft.objectives.policy.advantages import gae, token_divergences, token_rewards, whiten
from jaxft.rollouts.judged import Judged
from jaxft.rollouts.rollout import Rollout


@dataclass(frozen=True, kw_only=True, eq=False)
class Credit:
    """Of every answer of a rollout, arrays over its tokens [t], 0 on tokens that are not trained.

    trained: 1 on the sampled tokens of answers with a score. advantages: whitened over the rollout. returns: what the
    critic should have predicted. means: the mean advantage of each answer, [n]. divergence: from the reference, in nats
    of a whole answer, the mean over all answers; 0 without a reference. metrics: what is logged, by TRL's names.
    """

    trained: list[np.ndarray]
    advantages: list[np.ndarray]
    returns: list[np.ndarray]
    means: np.ndarray
    divergence: float
    metrics: dict[str, float]


def credit_of(
    judged: Judged,
    logps: Sequence[np.ndarray],
    log_ratios: Sequence[np.ndarray] | None,
    values: Sequence[np.ndarray],
    *,
    gamma: float,
    lam: float,
    kl_coef: float,
    kl_estimator: Literal["k1", "k3"],
    whiten_rewards: bool,
) -> Credit:
    """The credit of every token of a rollout.

    logps: log-probabilities of the answers' tokens under the policy that sampled them, [t] each. log_ratios: the same
    less those of the reference; None without a reference. values: what the critic predicted where each token was
    sampled. Rewards are `token_rewards`; advantages are `gae` over the sampled tokens alone, so that between two
    tokens of the model nothing is discounted for what an environment said. whiten_rewards: whether token rewards are
    first divided by their deviation.
    """
    rollouts = judged.rollouts
    sampled = [one.sampled for one in rollouts]
    ratios = [np.zeros(len(one)) for one in sampled] if log_ratios is None else log_ratios
    divergences = [token_divergences(x[own], kl_estimator) for x, own in zip(ratios, sampled, strict=True)]
    scored = [i for i, one in enumerate(rollouts) if not np.isnan(judged.rewards[i]) and one.sampled.any()]
    rewards = [token_rewards(float(judged.rewards[i]), divergences[i], kl_coef) for i in scored]
    if whiten_rewards:
        rewards = whiten(rewards, shift_mean=False)
    estimates = [gae(own, values[i][sampled[i]], gamma=gamma, lam=lam) for i, own in zip(scored, rewards, strict=True)]
    advantages = whiten([one.advantages for one in estimates])
    means = np.zeros(len(rollouts))
    means[scored] = [float(one.mean()) for one in advantages]
    penalties = np.array([-kl_coef * float(one.sum()) for one in divergences])
    metrics = {"objective/entropy": float(np.mean([-x[own].sum() for x, own in zip(logps, sampled, strict=True)]))}
    divergence = float(np.mean([one.sum() for one in divergences]))
    if log_ratios is not None:
        metrics |= {
            "objective/kl": divergence,
            "objective/non_score_reward": float(penalties.mean()),
            "objective/kl_coef": kl_coef,
        }
    if scored:
        metrics["objective/scores"] = float(judged.rewards[scored].mean())
        metrics["objective/rlhf_reward"] = float((judged.rewards + penalties)[scored].mean())
    return Credit(
        trained=_over_tokens(rollouts, scored, [np.ones(len(one)) for one in advantages]),
        advantages=_over_tokens(rollouts, scored, advantages),
        returns=_over_tokens(rollouts, scored, [one.returns for one in estimates]),
        means=means,
        divergence=divergence,
        metrics=metrics,
    )


def _over_tokens(rollouts: Sequence[Rollout], chosen: Sequence[int], values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Values of the sampled tokens of some answers, as arrays over all tokens of every answer; 0 elsewhere."""
    out = [np.zeros(len(one.tokens)) for one in rollouts]
    for index, own in zip(chosen, values, strict=True):
        out[index][rollouts[index].sampled] = own
    return out
