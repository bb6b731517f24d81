"""Sampled answers in a batch: every number at the place of its token or its answer."""

import numpy as np
import pytest

from jaxft.data.prompts import Prompt
from jaxft.rollouts.packed import pack_rollouts
from jaxft.rollouts.rollout import Rollout, completion_metrics


def rollout(number, prompt, answer, sampled=None, reason="stop"):
    tokens = np.array(answer, np.int32)
    return Rollout(
        prompt=Prompt(
            tokens=np.array(prompt, np.int32), mask=np.zeros(len(prompt), np.uint8), row=number, messages="", where=""
        ),
        number=number,
        group=number // 2,
        tokens=tokens,
        sampled=np.ones(len(tokens), bool) if sampled is None else np.array(sampled, bool),
        logprobs=-tokens.astype(np.float32),
        finish_reason=reason,
        text="",
    )


@pytest.fixture
def rollouts():
    return [
        rollout(0, [1, 2], [10, 11, 12]),
        rollout(1, [1, 2, 3], [20], reason="length"),
        rollout(2, [4], [30, 31, 32, 33, 34], sampled=[1, 1, 0, 0, 1]),
        rollout(3, [5, 6], [40, 41]),
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_numbers_stand_where_their_tokens_are_predicted(rollouts, packing):
    packed = pack_rollouts(rollouts, max_length=12, pad_id=0, multiple=2, packing=packing)
    batch = packed.batch
    assert len(batch.tokens_BS) == (2 if packing else 4)
    trained = batch.weights_BS > 0
    assert sorted(batch.targets_BS[trained]) == [10, 11, 12, 20, 30, 31, 34, 40, 41]
    # The log-probability of a token stands at the position that predicts it.
    np.testing.assert_array_equal(batch.arrays["sampler_logps"][trained], -batch.targets_BS[trained])
    values_BS = packed.by_token([one.tokens * 2 for one in rollouts])
    np.testing.assert_array_equal(values_BS[trained], 2 * batch.targets_BS[trained])
    for one, values in zip(rollouts, packed.tokens_of(values_BS), strict=True):
        np.testing.assert_array_equal(values, one.tokens * 2)
    numbers_BP = packed.by_document([7, 8, 9, 10])
    assert numbers_BP.sum() == 34
    for row, segments in enumerate(batch.segments_BS):
        for document in range(segments.max()):
            first = batch.targets_BS[row][(segments == document + 1) & trained[row]][0]
            assert numbers_BP[row, document] == {10: 7, 20: 8, 30: 9, 40: 10}[first]


def test_rows_are_a_multiple_and_few_shapes_are_compiled(rollouts):
    shapes = set()
    for count in range(1, 30):
        many = [rollouts[index % 4] for index in range(count)]
        packed = pack_rollouts(many, max_length=6, pad_id=0, multiple=4, packing=False)
        assert len(packed.batch.tokens_BS) % 4 == 0 and len(packed.batch.tokens_BS) >= count
        shapes.add(len(packed.batch.tokens_BS))
    assert shapes == {4, 8, 12, 16, 24, 32}


def test_answers_that_belong_together_are_neighbours(rollouts):
    packed = pack_rollouts(rollouts, max_length=12, pad_id=0, neighbors=2)
    for first, second in ((0, 1), (2, 3)):
        one, other = packed.spans[first], packed.spans[second]
        assert one.row == other.row and one.document + 1 == other.document and one.document % 2 == 0


def test_an_answer_that_is_too_long_is_an_error(rollouts):
    with pytest.raises(ValueError, match="more than max_length=5"):
        pack_rollouts(rollouts, max_length=5, pad_id=0)


def test_lengths_are_those_of_sampled_tokens(rollouts):
    metrics = completion_metrics(rollouts)
    assert metrics["completions/mean_length"] == (3 + 1 + 3 + 2) / 4
    assert metrics["completions/clipped_ratio"] == 0.25
    assert metrics["completions/mean_terminated_length"] == 8 / 3
