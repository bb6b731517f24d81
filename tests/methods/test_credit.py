"""The credit of tokens, also of answers in which an environment speaks, against loops over the sampled tokens."""

import numpy as np
import pytest

from jaxft.data.prompts import Prompt
from jaxft.methods.online.credit import credit_of
from jaxft.rollouts.judged import Judged
from jaxft.rollouts.rollout import Rollout

SAMPLED = ["110011", "111", "01101", "11"]
SCORES = np.array([1.5, -0.5, 0.25, np.nan])
SETTINGS = {"gamma": 0.9, "lam": 0.7, "kl_coef": 0.4, "kl_estimator": "k1", "whiten_rewards": False}


@pytest.fixture(scope="module")
def rollout():
    """(judged answers, log-probabilities, log-ratios, values)."""
    rng = np.random.default_rng(0)
    prompt = Prompt(tokens=np.arange(3), mask=np.zeros(3, np.uint8), row=0, messages="", where="row 0")
    rollouts = []
    for number, marks in enumerate(SAMPLED):
        sampled, tokens = np.array([mark == "1" for mark in marks]), np.arange(len(marks), dtype=np.int32)
        rollouts.append(
            Rollout(
                prompt=prompt, number=number, group=number // 2, tokens=tokens, sampled=sampled,
                logprobs=np.zeros(len(marks), np.float32), finish_reason="stop", text="",
            )
        )  # fmt: skip
    judged = Judged(rollouts=tuple(rollouts), rewards=SCORES, by_function={}, timeouts={}, seconds=0.0)
    arrays = [[rng.normal(size=len(marks)) for marks in SAMPLED] for _ in range(3)]
    return judged, *arrays


def by_hand(rollout, settings):
    """(advantages before whitening, returns, token rewards) of the sampled tokens of answers with a score."""
    judged, _, log_ratios, values = rollout
    rewards = []
    for one, ratio, score in zip(judged.rollouts[:3], log_ratios, SCORES, strict=False):
        r = ratio[one.sampled]
        kl = r if settings["kl_estimator"] == "k1" else np.exp(-r) - 1 + r
        rewards.append([-settings["kl_coef"] * x for x in kl])
        rewards[-1][-1] += score
    if settings["whiten_rewards"]:
        deviation = np.std([x for own in rewards for x in own], ddof=1)
        mean = np.mean([x for own in rewards for x in own])
        rewards = [[(x - mean) / deviation + mean for x in own] for own in rewards]
    advantages, returns = [], []
    for one, own, value in zip(judged.rollouts[:3], rewards, values, strict=False):
        v, last, reversed_advantages = value[one.sampled], 0.0, []
        for t in reversed(range(len(own))):
            following = v[t + 1] if t + 1 < len(own) else 0.0
            last = own[t] + settings["gamma"] * following - v[t] + settings["gamma"] * settings["lam"] * last
            reversed_advantages.append(last)
        advantages.append(np.array(reversed_advantages[::-1]))
        returns.append(advantages[-1] + v)
    return advantages, returns, rewards


@pytest.mark.parametrize("changes", [{}, {"kl_estimator": "k3"}, {"whiten_rewards": True}, {"gamma": 1.0, "lam": 1.0}])
def test_the_recursion_goes_over_sampled_tokens_alone(rollout, changes):
    """Within 1e-6 of itself; the small number that is added to variances is smaller."""
    settings = SETTINGS | changes
    judged, logps, log_ratios, values = rollout
    credit = credit_of(judged, logps, log_ratios, values, **settings)
    advantages, returns, _ = by_hand(rollout, settings)
    every = np.concatenate(advantages)
    for index, one in enumerate(judged.rollouts):
        scored = one.sampled & (index < 3)
        np.testing.assert_array_equal(credit.trained[index], scored)
        assert not credit.advantages[index][~scored].any() and not credit.returns[index][~scored].any()
        if index < 3:
            whitened = (advantages[index] - every.mean()) / every.std(ddof=1)
            np.testing.assert_allclose(credit.advantages[index][one.sampled], whitened, rtol=1e-6)
            np.testing.assert_allclose(credit.returns[index][one.sampled], returns[index], rtol=1e-6)
            assert credit.means[index] == pytest.approx(whitened.mean())
    assert credit.means[3] == 0


def test_metrics_are_means_over_answers(rollout):
    judged, logps, log_ratios, values = rollout
    credit = credit_of(judged, logps, log_ratios, values, **SETTINGS)
    sums = np.array([x[one.sampled].sum() for x, one in zip(log_ratios, judged.rollouts, strict=True)])
    entropies = [-x[one.sampled].sum() for x, one in zip(logps, judged.rollouts, strict=True)]
    # The divergence is that of all answers, with a score or without.
    assert credit.divergence == pytest.approx(sums.mean())
    assert credit.metrics == pytest.approx(
        {
            "objective/kl": sums.mean(), "objective/entropy": np.mean(entropies), "objective/kl_coef": 0.4,
            "objective/non_score_reward": -0.4 * sums.mean(), "objective/scores": SCORES[:3].mean(),
            "objective/rlhf_reward": (SCORES - 0.4 * sums)[:3].mean(),
        }
    )  # fmt: skip
    without = credit_of(judged, logps, None, values, **SETTINGS | {"kl_coef": 0.0})
    assert without.divergence == 0 and without.metrics.keys() == {
        "objective/entropy", "objective/scores", "objective/rlhf_reward",
    }  # fmt: skip
