"""The layout of a batch."""

import dataclasses

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
    kinds = [array.dtype for array in batch[:5]]
    assert kinds == [np.int32, np.int32, np.float32, np.int32, np.int32]


def test_numbers_of_documents_and_values_of_tokens_are_laid_out_beside_them():
    def carrying(tokens, number):
        array = np.array(tokens, np.float32)[:, None] * [1, 10]
        return dataclasses.replace(
            example(tokens, [0] + [1] * (len(tokens) - 1)), values={"margin": (number,)}, arrays={"top": array}
        )

    a, b = carrying([5, 6, 7], 0.5), carrying([8, 9], 2.0)
    batch = assemble([[a, b], []], max_length=6, like=b)
    assert batch.values["margin"].tolist() == [[0.5, 2, 0], [0, 0, 0]]
    assert batch.arrays["top"].shape == (2, 6, 2)
    assert batch.arrays["top"][0, :, 1].tolist() == [60, 70, 0, 90, 0, 0]  # where targets are 6, 7, none, 9
    longer = assemble([[a.prepend([1, 2])]], max_length=6, like=a)
    assert longer.arrays["top"][0, :, 0].tolist() == [0, 5, 6, 7, 0, 0] and longer.values["margin"][0, 0] == 0.5


def test_no_target_crosses_documents():
    first, second = example([1, 2], [0, 0]), example([3, 4], [1, 1])  # a mask that claims the first token
    batch = assemble([[first, second]], max_length=4)
    assert batch.targets_BS[0, 1] == 0 and batch.weights_BS[0, 1] == 0


def test_overfull_row_is_refused():
    with pytest.raises(ValueError, match=r"more than max_length=3"):
        assemble([[example([1, 2], [0, 1]), example([1, 2], [0, 1])]], max_length=3)
