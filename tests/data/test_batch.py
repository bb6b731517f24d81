"""The layout of a batch."""

import numpy as np
import pytest

from jaxft.data.batch import Example, assemble


def example(tokens, mask, row=0):
    return Example(tokens=np.array(tokens, np.int32), mask=np.array(mask, np.uint8), row=row)


def test_assemble_lays_documents_out():
    a, b = example([5, 6, 7], [0, 1, 1]), example([8, 9], [0, 1])
    batch = assemble([[a, b], [b], []], max_length=6, pad_id=3)
    assert batch.tokens_BS.tolist() == [[5, 6, 7, 8, 9, 3], [8, 9, 3, 3, 3, 3], [3] * 6]
    assert batch.targets_BS.tolist() == [[6, 7, 0, 9, 0, 0], [9, 0, 0, 0, 0, 0], [0] * 6]
    assert batch.weights_BS.tolist() == [[1, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6]
    assert batch.segments_BS.tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0], [0] * 6]
    kinds = [array.dtype for array in batch]
    assert kinds == [np.int32, np.int32, np.float32, np.int32, np.int32]


def test_no_target_crosses_documents():
    first, second = example([1, 2], [0, 0]), example([3, 4], [1, 1])  # a mask that claims the first token
    batch = assemble([[first, second]], max_length=4)
    assert batch.targets_BS[0, 1] == 0 and batch.weights_BS[0, 1] == 0


def test_overfull_row_is_refused():
    with pytest.raises(ValueError, match=r"more than max_length=3"):
        assemble([[example([1, 2], [0, 1]), example([1, 2], [0, 1])]], max_length=3)
