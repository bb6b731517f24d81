"""Answers that share their prompt: nothing changes but the work."""

import jax
import numpy as np
import pytest
from test_packed import rollout

from jaxft.rollouts.packed import pack_rollouts
from jaxft.rollouts.shared_prompts import pack_with_shared_prompts

PROMPTS = {0: [1, 2, 3, 4], 1: [5, 6], 2: [7, 8, 9]}


@pytest.fixture
def rollouts():
    """Three groups of answers of one to five tokens."""
    lengths = [3, 1, 5, 2, 4, 4, 2, 1, 5]
    return [rollout(n, PROMPTS[n // 3], range(10 * n + 10, 10 * n + 10 + length)) for n, length in enumerate(lengths)]


def documents_of(packed):
    """The whole documents as attention sees them: (tokens, positions, place in the row) of each."""
    batch, whole = packed.batch, packed.batch.whole
    found = []
    for row, ways in enumerate(whole.index_BWS):
        for index, segments in zip(ways, whole.segments_BWS[row], strict=True):
            for segment in range(1, segments.max() + 1):
                at = index[segments == segment]
                found.append((batch.tokens_BS[row][at].tolist(), batch.positions_BS[row][at].tolist(), (row, at)))
    return found


def test_attention_sees_every_prompt_with_its_answer(rollouts):
    packed = pack_with_shared_prompts(rollouts, max_length=16, pad_id=0)
    documents = documents_of(packed)
    expected = [[*one.prompt.tokens.tolist(), *one.tokens.tolist()] for one in rollouts]
    assert sorted(tokens for tokens, _, _ in documents) == sorted(expected)
    assert all(positions == list(range(len(tokens))) for tokens, positions, _ in documents)
    plain = pack_rollouts(rollouts, max_length=16, pad_id=0)
    assert np.count_nonzero(packed.batch.segments_BS) < np.count_nonzero(plain.batch.segments_BS)


def test_every_token_comes_back_from_where_it_was_taken(rollouts):
    packed = pack_with_shared_prompts(rollouts, max_length=16, pad_id=0, multiple=2)
    batch, whole = packed.batch, packed.batch.whole
    for row, back in enumerate(whole.back_BS):
        filled = batch.segments_BS[row] > 0
        np.testing.assert_array_equal(whole.index_BWS[row].reshape(-1)[back[filled]], np.flatnonzero(filled))
        assert (whole.segments_BWS[row].reshape(-1)[back[filled]] > 0).all()


@pytest.mark.parametrize("max_length", [9, 16, 64])
def test_numbers_stand_where_their_tokens_are_predicted(rollouts, max_length):
    packed = pack_with_shared_prompts(rollouts, max_length=max_length, pad_id=0)
    batch = packed.batch
    trained = batch.weights_BS > 0
    assert sorted(batch.targets_BS[trained]) == sorted(token for one in rollouts for token in one.tokens.tolist())
    np.testing.assert_array_equal(batch.arrays["sampler_logps"][trained], -batch.targets_BS[trained])
    values_BS = packed.by_token([one.tokens * 2 for one in rollouts])
    np.testing.assert_array_equal(values_BS[trained], 2 * batch.targets_BS[trained])
    numbers_BP = packed.by_document(np.arange(1, 10))
    for number, (one, span) in enumerate(zip(rollouts, packed.spans, strict=True), 1):
        assert numbers_BP[span.row, span.document] == number
        of_document = (batch.segments_BS[span.row] == span.document + 1) & trained[span.row]
        assert batch.targets_BS[span.row][of_document].tolist() == one.tokens.tolist()


def test_a_group_that_does_not_fit_into_a_row_is_divided(rollouts):
    packed = pack_with_shared_prompts(rollouts, max_length=9, pad_id=0)
    assert len({span.row for span in packed.spans[:3]}) > 1
    assert len(documents_of(packed)) == len(rollouts)


def test_prompts_that_differ_are_not_shared(rollouts):
    other = [rollout(n, [n + 1, 2], [30 + n]) for n in range(3)]
    packed = pack_with_shared_prompts(other, max_length=16, pad_id=0)
    assert np.count_nonzero(packed.batch.segments_BS) == 9


def test_an_answer_that_is_too_long_is_an_error(rollouts):
    with pytest.raises(ValueError, match="answer 2 has 9 tokens with its prompt, more than max_length=8"):
        pack_with_shared_prompts(rollouts, max_length=8, pad_id=0)


def test_rows_are_cut_like_those_of_any_batch(rollouts):
    batch = pack_with_shared_prompts(rollouts, max_length=16, pad_id=0, multiple=4).batch
    assert len(batch.tokens_BS) % 4 == 0
    assert {len(leaf) for leaf in jax.tree.leaves(batch)} == {len(batch.tokens_BS)}
