"""Groups of answers that are replaced by those to other prompts."""

import numpy as np
import pytest

from jaxft.data.prompts import Prompt
from jaxft.rollouts.judged import Judged
from jaxft.rollouts.rollout import Rollout


def judged(rewards, timeouts, text):
    prompt = Prompt(tokens=np.array([1]), mask=np.zeros(1, np.uint8), row=0, messages="", where="")
    ones = np.ones(1)
    rollouts = [
        Rollout(
            prompt=prompt, number=number, group=number // 2, tokens=ones.astype(np.int32), sampled=ones.astype(bool),
            logprobs=-ones, finish_reason="stop", text=f"{text}{number}",
        )
        for number in range(len(rewards))
    ]  # fmt: skip
    values = np.array(rewards, np.float64)
    return Judged(
        rollouts=tuple(rollouts), rewards=values, by_function={"f": values}, timeouts={"f": timeouts}, seconds=1.0
    )


def test_metrics_are_those_of_the_answers_that_are_kept():
    first, others = judged([0, 1, 1, 1, 0, 2], 1, "a"), judged([4, np.nan], 3, "b")
    both = first.with_groups([1], others)
    assert [one.text for one in both.rollouts] == ["a0", "a1", "b0", "b1", "a4", "a5"]
    assert [one.number for one in both.rollouts] == list(range(6)) and both.groups.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(both.rewards, [0, 1, 4, np.nan, 0, 2])
    metrics = both.metrics()
    assert metrics["rewards/f/mean"] == pytest.approx(metrics["reward"]) == pytest.approx(7 / 5)
    # Time was lost for the answers that were replaced, too.
    assert metrics["rewards/f/timeouts"] == 4 and metrics["rewards/f/unscored"] == 1
    assert metrics["reward_seconds"] == 2
