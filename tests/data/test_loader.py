"""Batches by step: a permutation each epoch, seek, packed content equals unpacked, held-out passes."""

from collections import Counter

import numpy as np
import pytest

from jaxft.data.batch import Example
from jaxft.data.loader import Loader


def examples(count, seed=0, longest=16):
    rng = np.random.default_rng(seed)
    made = []
    for row in range(count):
        n = int(rng.integers(2, longest + 1))
        mask = rng.integers(0, 2, n).astype(np.uint8)
        mask[0], mask[-1] = 0, 1
        tokens = rng.integers(10, 1000, n).astype(np.int32)
        tokens[0] = row  # names the example
        made.append(Example(tokens=tokens, mask=mask, row=row))
    return made


def documents(batch):
    """Every document of a batch as (tokens, targets, weights, positions)."""
    for b in range(len(batch.tokens_BS)):
        for segment in range(1, batch.segments_BS[b].max() + 1):
            at = batch.segments_BS[b] == segment
            yield tuple(tuple(array[b][at].tolist()) for array in batch[:4])


@pytest.mark.parametrize("packing", [True, False])
def test_each_epoch_is_a_permutation(packing):
    loader = Loader(examples(300), batch_size=1, max_length=32, packing=packing, seed=7)
    epoch = len(loader.plan)
    orders = []
    for start in (0, epoch, 2 * epoch):
        seen = [d[0][0] for step in range(start, start + epoch) for d in documents(loader.batch(step))]
        assert sorted(seen) == list(range(300))
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]


def test_batches_run_on_into_the_next_epoch():
    loader = Loader(examples(70), batch_size=4, max_length=16, packing=False, seed=1)
    seen = Counter(d[0][0] for step in range(35) for d in documents(loader.batch(step)))
    assert seen == {row: 2 for row in range(70)}  # 35 * 4 = 2 * 70
    assert all((loader.batch(step).segments_BS[:, 0] == 1).all() for step in range(35))


def test_fewer_sequences_than_the_batch():
    loader = Loader(examples(3), batch_size=7, max_length=16, packing=False, seed=1)
    seen = Counter(d[0][0] for d in documents(loader.batch(0)))
    assert seen.total() == 7 and min(seen.values()) == 2


def test_without_shuffle_the_order_is_the_data_order():
    loader = Loader(examples(6), batch_size=4, max_length=16, packing=False, shuffle=False)
    assert loader.batch(0).tokens_BS[:, 0].tolist() == [0, 1, 2, 3]
    assert loader.batch(1).tokens_BS[:, 0].tolist() == [4, 5, 0, 1]


def test_seek_equals_reading_on():
    made = examples(100)
    read = Loader(made, batch_size=8, max_length=32, seed=3)
    stream = [read.batch(step) for step in range(40)]
    fresh = Loader(made, batch_size=8, max_length=32, seed=3)
    for step in (39, 0, 17):
        for ours, theirs in zip(fresh.batch(step), stream[step], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    other = Loader(made, batch_size=8, max_length=32, seed=4)
    assert (other.batch(0).tokens_BS != stream[0].tokens_BS).any()


def test_processes_get_their_rows():
    loader = Loader(examples(100), batch_size=8, max_length=32, seed=3)
    whole = loader.batch(5)
    for rows in (slice(0, 4), slice(4, 8), slice(2, 3)):
        for part, array in zip(loader.batch(5, rows=rows)[:5], whole[:5], strict=True):
            np.testing.assert_array_equal(part, array[rows])


def test_packed_content_equals_unpacked():
    made = examples(200)
    packed = Loader(made, batch_size=1, max_length=48, packing=True)
    single = Loader(made, batch_size=1, max_length=48, packing=False)
    assert len(packed.plan) < len(single.plan) / 3
    contents = [Counter(d for batch in loader.eval_batches() for d in documents(batch)) for loader in (packed, single)]
    assert contents[0] == contents[1]


def test_eval_batches_pass_once_and_pad_with_empty_rows():
    loader = Loader(examples(10), batch_size=4, max_length=16, packing=False, seed=5)
    batches = list(loader.eval_batches())
    assert [batch.tokens_BS.shape for batch in batches] == [(4, 16)] * 3
    assert [d[0][0] for batch in batches for d in documents(batch)] == list(range(10))
    assert batches[-1].segments_BS[2:].max() == 0 and batches[-1].weights_BS[2:].max() == 0
    halves = list(loader.eval_batches(rows=slice(2, 4)))
    assert all(
        half.tokens_BS.tolist() == batch.tokens_BS[2:].tolist() for half, batch in zip(halves, batches, strict=True)
    )


def test_steps_and_epochs():
    loader = Loader(examples(10), batch_size=4, max_length=16, packing=False)
    assert loader.steps_per_epoch == 2.5
    assert [loader.steps_for(epochs) for epochs in (0.1, 1, 2, 3)] == [1, 3, 5, 8]
    assert loader.epoch_of(5) == 2.0
    assert Loader(examples(30), batch_size=1, max_length=16, packing=False).steps_for(0.1) == 3


def test_nothing_to_load_is_refused():
    with pytest.raises(ValueError, match=r"at least one example"):
        Loader([], batch_size=1, max_length=8)
