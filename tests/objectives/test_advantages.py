"""Advantages against TRL's and by hand; generalised advantage estimation against its definition, in float64.

`tests/oracles/record_advantages.py` recorded what TRL 1.16 computed, in float32, and `record_gae.py` what verl 0.8 did.
"""

import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import advantage_cases, gae_cases

from jaxft.objectives.policy.advantages import (
    alike_groups,
    gae,
    group_advantages,
    leave_one_out,
    penalized_rewards,
    reward_metrics,
    token_rewards,
    whiten,
)
from jaxft.objectives.policy.value import value_terms

ORACLES = Path(__file__).parents[1] / "oracles"
RECORDS = np.load(ORACLES / "advantages.npz")
NAN = float("nan")
REWARDS = np.array([1.0, 5.0, 2.0, 6.0, NAN, 4.0, 3.0, 3.0])
GROUPS = np.array([7, 2, 7, 7, 2, 2, 5, 5])  # groups need not be neighbours


@pytest.mark.parametrize(("case", "scale"), advantage_cases.GRPO.items())
def test_group_advantages_are_those_of_trl(case, scale):
    """Within 1e-6, and metrics within 1e-6 of themselves."""
    rewards = advantage_cases.REWARDS
    groups = np.arange(len(rewards)) // advantage_cases.GENERATIONS
    np.testing.assert_allclose(group_advantages(rewards, groups, scale), RECORDS[f"grpo/{case}"], rtol=0, atol=1e-6)
    expected, metrics = json.loads(str(RECORDS["metrics"])), reward_metrics(rewards, groups)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", advantage_cases.RLOO)
def test_leave_one_out_is_that_of_trl(case):
    """Within 1e-6."""
    settings = advantage_cases.RLOO[case]
    groups = np.arange(len(advantage_cases.REWARDS)) // advantage_cases.GENERATIONS
    rewards = penalized_rewards(advantage_cases.REWARDS, advantage_cases.log_ratios(), settings.get("beta", 0.0))
    advantages = leave_one_out(rewards, groups, normalize=settings.get("normalize", False))
    np.testing.assert_allclose(advantages, RECORDS[f"rloo/{case}"], rtol=0, atol=1e-6)


def test_group_advantages_by_hand():
    advantages = group_advantages(REWARDS, GROUPS)
    of_7, of_2 = statistics.stdev([1, 2, 6]) + 1e-4, statistics.stdev([5, 4]) + 1e-4
    expected = [-2 / of_7, 0.5 / of_2, -1 / of_7, 3 / of_7, 0, -0.5 / of_2, 0, 0]
    np.testing.assert_allclose(advantages, expected, rtol=1e-12)
    of_batch = statistics.stdev([1, 5, 2, 6, 4, 3, 3]) + 1e-4
    differences = np.array([-2, 0.5, -1, 3, 0, -0.5, 0, 0])
    np.testing.assert_allclose(group_advantages(REWARDS, GROUPS, "batch"), differences / of_batch, rtol=1e-12)
    np.testing.assert_allclose(group_advantages(REWARDS, GROUPS, "none"), differences, rtol=1e-12)


def test_leave_one_out_by_hand():
    advantages = leave_one_out(REWARDS, GROUPS)
    np.testing.assert_allclose(advantages, [-3, 1, -1.5, 4.5, 0, -1, 0, 0], rtol=1e-12)
    scored = [-3, 1, -1.5, 4.5, -1, 0, 0]
    expected = (np.array([*scored[:4], NAN, *scored[4:]]) - statistics.mean(scored)) / (statistics.stdev(scored) + 1e-4)
    expected[4] = 0  # was not scored
    np.testing.assert_allclose(leave_one_out(REWARDS, GROUPS, normalize=True), expected, rtol=1e-12)


@pytest.mark.parametrize("advantages_of", [group_advantages, leave_one_out])
def test_nothing_is_learned_from_alike_rewards_or_a_single_one(advantages_of):
    rewards, groups = np.array([0.1, 0.1, 0.1, NAN, 2.0, NAN, NAN]), np.array([0, 0, 0, 1, 1, 2, 2])
    assert np.std(rewards[:3], ddof=1) > 0  # rounding: a deviation does not tell that they are alike
    np.testing.assert_array_equal(advantages_of(rewards, groups), np.zeros(7))
    np.testing.assert_array_equal(alike_groups(rewards, groups), [0, 1, 2])
    assert not advantages_of(np.full(3, NAN), np.zeros(3, np.int64)).any()


def test_metrics_of_rewards():
    metrics = reward_metrics(REWARDS, GROUPS)
    assert metrics == pytest.approx(
        {"reward": 24 / 7, "reward_std": statistics.stdev([1, 5, 2, 6, 4, 3, 3]), "frac_reward_zero_std": 1 / 3}
    )
    assert reward_metrics(np.array([NAN, NAN]), np.array([0, 0])) == {"frac_reward_zero_std": 1.0}


def test_rewards_that_are_no_rewards_are_refused():
    with pytest.raises(ValueError, match="the reward of answer 1 is infinite"):
        group_advantages(np.array([1.0, np.inf]), np.array([0, 0]))
    with pytest.raises(ValueError, match=r"rewards \(2,\) and groups \(3,\) must be one number for each answer"):
        leave_one_out(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="an answer of 0 tokens with score 1.0 has no rewards"):
        token_rewards(1.0, np.zeros(0), 0.1)
    with pytest.raises(ValueError, match="an answer of 2 tokens with score nan has no rewards"):
        token_rewards(NAN, np.zeros(2), 0.1)


def test_penalties_are_sums_over_answers_or_numbers_of_tokens():
    log_ratios = [np.array([0.5, -0.25]), np.array([1.0])]
    np.testing.assert_allclose(penalized_rewards(np.array([2.0, NAN]), log_ratios, 0.4), [1.9, NAN])
    np.testing.assert_allclose(token_rewards(2.0, log_ratios[0], 0.4), [-0.2, 2.1])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_gae_is_its_definition(gamma, lam, length):
    """Eq. 16 of arXiv:1506.02438 as it is written, within 1e-12."""
    rng = np.random.default_rng(length)
    rewards, values = rng.normal(size=length), rng.normal(size=length)

    def difference(t):
        later = values[t + 1] if t + 1 < length else 0.0
        return rewards[t] + gamma * later - values[t]

    expected = [sum((gamma * lam) ** (k - t) * difference(k) for k in range(t, length)) for t in range(length)]
    out = gae(rewards.astype(np.float64), values, gamma=gamma, lam=lam)
    np.testing.assert_allclose(out.advantages, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(out.returns, np.array(expected) + values, rtol=0, atol=1e-12)
    if lam == 1:  # the discounted sum of rewards still to come
        returns = [sum(gamma ** (k - t) * rewards[k] for k in range(t, length)) for t in range(length)]
        np.testing.assert_allclose(out.returns, returns, rtol=0, atol=1e-12)


def test_gae_of_full_rows_is_the_recursion_over_columns():
    """As PPO trainers compute it for rows that all end in the last column."""
    rng, gamma, lam = np.random.default_rng(1), 0.97, 0.9
    rewards_BT, values_BT = rng.normal(size=(2, 3, 7))
    last_B, columns = np.zeros(3), []
    for t in reversed(range(7)):
        later_B = values_BT[:, t + 1] if t < 6 else np.zeros(3)
        last_B = rewards_BT[:, t] + gamma * later_B - values_BT[:, t] + gamma * lam * last_B
        columns.append(last_B)
    rows = [gae(rewards_BT[b], values_BT[b], gamma=gamma, lam=lam).advantages for b in range(3)]
    np.testing.assert_allclose(rows, np.stack(columns[::-1], axis=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", gae_cases.SETTINGS)
def test_gae_whitening_and_value_loss_are_those_of_verl(name):
    """Also where an environment wrote some of the tokens: they are left out. Recorded, within 1e-9; the loss 1e-6."""
    recorded = np.load(ORACLES / "gae.npz")
    mask_BT = gae_cases.sampled_BT()
    rewards_BT, values_BT, predicted_BT = gae_cases.arrays()
    gamma, lam = gae_cases.SETTINGS[name]
    places = [np.flatnonzero(row) for row in mask_BT]
    credits = [gae(rewards_BT[b, at], values_BT[b, at], gamma=gamma, lam=lam) for b, at in enumerate(places)]
    whitened = whiten([credit.advantages for credit in credits])
    returns_BT = np.zeros_like(mask_BT)
    for b, (at, credit) in enumerate(zip(places, credits, strict=True)):
        np.testing.assert_allclose(whitened[b], recorded[f"{name}/advantages"][b, at], rtol=0, atol=1e-9)
        np.testing.assert_allclose(credit.returns, recorded[f"{name}/returns"][b, at], rtol=0, atol=1e-9)
        returns_BT[b, at] = credit.returns

    def value_loss(predicted_BT):
        terms_BT, clipped_BT = value_terms(predicted_BT, values_BT, returns_BT, gae_cases.CLIPRANGE)
        return jnp.sum(terms_BT * mask_BT) / mask_BT.sum(), jnp.sum(clipped_BT * mask_BT) / mask_BT.sum()

    (loss, clipped), gradient = jax.value_and_grad(value_loss, has_aux=True)(jnp.asarray(predicted_BT))
    assert 0 < float(clipped) < 1
    np.testing.assert_allclose(loss, recorded[f"{name}/value_loss"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(clipped, recorded[f"{name}/clipped"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(gradient, recorded[f"{name}/value_gradient"], rtol=0, atol=1e-6)


def test_whitened_values_have_mean_0_and_variance_1_over_the_whole_batch():
    rng = np.random.default_rng(0)
    values = [rng.normal(3.0, 5.0, size).astype(np.float32) for size in (4, 1, 7)]
    every = np.concatenate(whiten(values))
    assert every.mean() == pytest.approx(0, abs=1e-7) and every.var(ddof=1) == pytest.approx(1, rel=1e-6)
    kept = np.concatenate(whiten(values, shift_mean=False))
    np.testing.assert_allclose(kept - np.mean(np.concatenate(values, dtype=np.float64)), every, atol=1e-6)
    assert [len(one) for one in whiten(values)] == [4, 1, 7] and whiten([]) == []
