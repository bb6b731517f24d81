"""Warnings about runs that learn from rewards, each told once."""

import pytest

from jaxft.training.reward_watch import RewardWatch


def row(**changes):
    return {"reward": 0.5, "frac_reward_zero_std": 0.2, "completions/mean_length": 20.0, "entropy": 1.0} | changes


def warnings_of(rows):
    watch = RewardWatch()
    return [warning for one in rows if (warning := watch.add(one)) is not None]


def test_a_run_that_goes_well_is_not_warned_about():
    rows = [row(reward=step / 60, entropy=1 - step / 100, frac_reward_zero_std=step / 60) for step in range(60)]
    rows[30:30] = [{"eval_reward": 0.4}]
    assert warnings_of([*rows, {"eval_reward": 0.6}]) == [] and RewardWatch.warning_of(rows) is None


def test_groups_that_are_alike_for_twenty_steps():
    alike = [row(frac_reward_zero_std=1.0, entropy=0.0)]
    assert warnings_of(alike * 19 + [row()] + alike * 19) == []
    (warning,) = warnings_of(alike * 50)
    assert "for 20 logged steps the rewards of every group have been alike" in warning


@pytest.mark.parametrize(
    ("name", "last", "message"),
    [
        ("entropy", 0.05, "the entropy of the policy fell from 1 to 0.05 nats a token"),
        ("completions/mean_length", 50.0, "answers grew from 20 to 50 tokens on average"),
    ],
)
def test_entropy_that_collapses_and_lengths_that_run_away(name, last, message):
    rows = [row() for _ in range(10)] + [row(**{name: last}) for _ in range(15)]
    (warning,) = warnings_of(rows)
    assert message in warning
    assert message in RewardWatch.warning_of(rows)
    # Not before the windows are apart.
    assert warnings_of(rows[:19]) == []


def test_a_held_out_reward_that_falls_while_the_reward_rises():
    def run(held_out, rewards):
        return [
            x
            for reward, value in zip(rewards, held_out, strict=True)
            for x in (row(reward=reward), {"eval_reward": value})
        ]

    (warning,) = warnings_of(run([0.6, 0.5, 0.4, 0.3], [0.5, 0.6, 0.7, 0.8]))
    assert "the held-out reward fell from 0.6 to 0.4 in two evaluations" in warning and "rose to 0.7" in warning
    assert warnings_of(run([0.6, 0.5, 0.55, 0.5], [0.5, 0.6, 0.7, 0.8])) == []
    assert warnings_of(run([0.6, 0.5, 0.4], [0.5, 0.4, 0.3])) == []
