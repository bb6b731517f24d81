"""Advantages of sampled answers and of their tokens, computed on the host from the rewards of a whole rollout.

Rewards and groups are arrays [n] over answers: a reward is NaN if its answer was not scored, and answers with the same
number in `groups` are answers to one prompt. Results are float64.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

Scale = Literal["group", "batch", "none"]

# Added to a deviation before a division by it, as in TRL.
EPSILON = 1e-4
# Added to a variance, as in TRL and verl.
VARIANCE_EPSILON = 1e-8


class Gae(NamedTuple):
    """Of the tokens of an answer, [t]: their advantages, and the returns that their values should predict."""

    advantages: np.ndarray
    returns: np.ndarray


def group_advantages(rewards: np.ndarray, groups: np.ndarray, scale: Scale = "group") -> np.ndarray:
    """How much each answer's reward exceeds the mean of its group, [n].

    scale: what the difference is divided by: the deviation of the rewards in the group (GRPO, arXiv:2402.03300, section
    4.1.2) or in the whole batch (arXiv:2508.08221), each plus 1e-4, or nothing (Dr. GRPO, arXiv:2503.20783). The
    deviation has the number of rewards less 1 in its divisor. Answers that were not scored are left out of means and
    deviations and have advantage 0, and so do all answers of a group whose rewards are alike. Raises ValueError if a
    reward is infinite.
    """
    _check(rewards, groups)
    out = np.zeros(len(rewards))
    of_batch = _deviation(rewards[~np.isnan(rewards)])
    for members in _scored_groups(rewards, groups):
        own = rewards[members]
        if not _are_alike(own):
            divisor = {"group": _deviation(own) + EPSILON, "batch": of_batch + EPSILON, "none": 1.0}[scale]
            out[members] = (own - own.mean()) / divisor
    return out


def leave_one_out(rewards: np.ndarray, groups: np.ndarray, *, normalize: bool = False) -> np.ndarray:
    """How much each answer's reward exceeds the mean of the other answers of its group, [n].

    normalize: whether the advantages of all scored answers are shifted to mean 0 and divided by their deviation.
    Answers that were not scored, or are the only scored one of their group, have advantage 0. Raises ValueError if a
    reward is infinite. Source: RLOO, arXiv:2402.14740.
    """
    _check(rewards, groups)
    out = np.full(len(rewards), np.nan)
    for members in _scored_groups(rewards, groups):
        own = rewards[members]
        if _are_alike(own):
            out[members] = 0.0 if len(own) > 1 else np.nan
        else:
            out[members] = own - (own.sum() - own) / (len(own) - 1)
    known = ~np.isnan(out)
    if normalize and known.any():
        out[known] = (out[known] - out[known].mean()) / (_deviation(out[known]) + EPSILON)
    return np.where(known, out, 0.0)


def penalized_rewards(rewards: np.ndarray, log_ratios: Sequence[np.ndarray], beta: float) -> np.ndarray:
    """Each reward less beta times the estimated KL divergence of its whole answer from the reference, [n].

    log_ratios: of each answer, policy less reference of its trained tokens in nats; their sum is the estimator k1.
    """
    return rewards - beta * np.array([float(np.sum(one)) for one in log_ratios])


def alike_groups(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The groups from which nothing can be learned, in order: fewer than two rewards, or rewards that are all equal."""
    telling = {groups[members[0]] for members in _scored_groups(rewards, groups) if not _are_alike(rewards[members])}
    return np.array([group for group in np.unique(groups) if group not in telling], dtype=groups.dtype)


def reward_metrics(rewards: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """By TRL's names: reward, reward_std and frac_reward_zero_std, the share of groups in `alike_groups`.

    Without a scored answer there is only the last; the deviation of a single one is 0.
    """
    scored = rewards[~np.isnan(rewards)]
    shares = {"frac_reward_zero_std": len(alike_groups(rewards, groups)) / max(len(np.unique(groups)), 1)}
    if not len(scored):
        return shares
    return {"reward": float(scored.mean()), "reward_std": _deviation(scored)} | shares


def token_divergences(log_ratios: np.ndarray, estimator: Literal["k1", "k3"]) -> np.ndarray:
    """An estimate of KL(policy, reference) at each sampled token in nats, [t] float64.

    log_ratios: policy less reference, [t]. `k1` is the log-ratio itself; `k3` is exp(r) - r - 1 with r its negative,
    which is never negative (http://joschu.net/blog/kl-approx.html).
    """
    log_ratios = np.asarray(log_ratios, np.float64)
    return log_ratios if estimator == "k1" else np.expm1(-log_ratios) + log_ratios


def token_rewards(score: float, divergences: np.ndarray, kl_coef: float) -> np.ndarray:
    """The reward of each token of an answer, [t]: -kl_coef times its divergence, and the score on the last token.

    divergences: `token_divergences`, [t]. Raises ValueError if the answer has no token or no score.
    """
    if not len(divergences) or not np.isfinite(score):
        raise ValueError(f"an answer of {len(divergences)} tokens with score {score} has no rewards: leave it out")
    rewards = -kl_coef * np.asarray(divergences, np.float64)
    rewards[-1] += score
    return rewards


def gae(rewards: np.ndarray, values: np.ndarray, *, gamma: float = 1.0, lam: float = 0.95) -> Gae:
    """Generalised advantage estimation over the tokens of one answer.

    With d_t = r_t + gamma v_(t+1) - v_t, the advantage of token t is the sum over l >= 0 of (gamma lam)^l d_(t+l), and
    its return is the advantage plus v_t. After the last token the value is 0. rewards: `token_rewards`. values:
    predictions for the states in which the tokens were sampled. Both [t]. Source: arXiv:1506.02438, eq. 16.
    """
    rewards, values = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    differences = rewards + gamma * np.append(values[1:], 0.0) - values
    advantages = np.zeros_like(differences)
    later = 0.0
    for t in reversed(range(len(differences))):
        later = differences[t] + gamma * lam * later
        advantages[t] = later
    return Gae(advantages, advantages + values)


def whiten(values: Sequence[np.ndarray], *, shift_mean: bool = True) -> list[np.ndarray]:
    """The values of all answers' tokens, [t] each, divided by their deviation over the whole batch.

    shift_mean: whether their mean becomes 0; otherwise it stays as it was. The variance has the number of tokens less 1
    in its divisor, and 1e-8 is added to it.
    """
    every = np.concatenate([np.asarray(one, np.float64) for one in values]) if len(values) else np.zeros(0)
    if not len(every):
        return list(values)
    mean, scale = every.mean(), 1 / np.sqrt(_deviation(every) ** 2 + VARIANCE_EPSILON)
    return [(one - mean) * scale + (0.0 if shift_mean else mean) for one in values]


def _scored_groups(rewards: np.ndarray, groups: np.ndarray) -> Iterator[np.ndarray]:
    """Of each group in which an answer was scored, the indices of these answers."""
    scored = ~np.isnan(rewards)
    for group in np.unique(groups[scored]):
        yield np.flatnonzero(scored & (groups == group))


def _are_alike(rewards: np.ndarray) -> bool:
    # By equality: the deviation of equal numbers is not always 0 when it is rounded.
    return bool(np.all(rewards == rewards[0]))


def _deviation(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _check(rewards: np.ndarray, groups: np.ndarray) -> None:
    if rewards.shape != groups.shape or rewards.ndim != 1:
        raise ValueError(f"rewards {rewards.shape} and groups {groups.shape} must be one number for each answer")
    if np.isinf(rewards).any():
        where = int(np.flatnonzero(np.isinf(rewards))[0])
        raise ValueError(f"the reward of answer {where} is infinite, so it has no advantage: return None or a number")
