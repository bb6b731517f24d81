"""Which prompts are answered when: every one once an epoch, in an order that a resumed run has too."""

from collections import Counter

import numpy as np
import pytest

from jaxft.data.prompts import Prompt
from jaxft.rollouts.order import PromptOrder


def order_of(count=7, **changes):
    prompts = [
        Prompt(tokens=np.array([n], np.int32), mask=np.zeros(1, np.uint8), row=n, messages=str(n), where=f"row {n}")
        for n in range(count)
    ]
    settings = {"prompts_per_rollout": 3, "updates": 2, "shuffle": True, "seed": 5, "epochs": 2.0, "steps": None}
    return PromptOrder(prompts=prompts, **settings | changes)


def rows_of(order, rollouts):
    return [prompt.row for number in range(rollouts) for prompt in order.prompts_of(number)]


def test_every_prompt_is_answered_once_an_epoch():
    order = order_of()
    assert Counter(rows_of(order, 7)) == dict.fromkeys(range(7), 3)
    assert rows_of(order, 7)[:7] != rows_of(order, 7)[7:14]
    assert rows_of(order_of(shuffle=False), 3) == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert rows_of(order_of(seed=6), 3) != rows_of(order, 3)


def test_steps_of_a_rollout_and_of_a_run():
    order = order_of()
    assert [order.rollout_of(step) for step in range(6)] == [0, 0, 1, 1, 2, 2]
    # Two epochs of seven prompts are 14/3 rollouts, so five, of two steps each.
    assert order.total_steps == 10 and order.steps_per_epoch == pytest.approx(14 / 3)
    assert order_of(steps=4).total_steps == 4 and order.epoch_of(7) == 1.5


def test_prompts_that_replace_others_depend_on_rollout_and_draw_alone():
    order = order_of()
    draws = [[p.row for p in order.spare_prompts(rollout, draw, 3)] for rollout in range(4) for draw in range(4)]
    assert len({tuple(draw) for draw in draws}) > 10
    assert [p.row for p in order.spare_prompts(2, 1, 2)] == draws[2 * 4 + 1][:2]


def test_it_has_no_batches():
    with pytest.raises(TypeError, match="has prompts, not batches"):
        order_of().batch(0)
