"""Matrices that are quantised in their files, read dense: a source of tensors in which they appear as float32."""

# O outputs, I inputs, G groups of inputs that share a scale, W words of 32 bits, K codes in a word

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds
from jaxft.errors import CheckpointError, did_you_mean

FLOAT32 = np.dtype(np.float32)


class QuantizedMatrix(Protocol):
    """A matrix [O, I] in the form of its files. parts: the names of its tensors there."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def parts(self) -> tuple[str, ...]: ...

    def rows(self, source: TensorSource, start: int, stop: int) -> np.ndarray:
        """Outputs start:stop as float32 [stop - start, I]. Raises CheckpointError for codes without a meaning."""
        ...


class Dequantized:
    """A source whose quantised matrices appear as one float32 tensor each; other tensors stay as they are.

    matrices: by name. left_out: tensors of the source that are not shown, such as scales of activations.
    """

    def __init__(
        self, source: TensorSource, matrices: Mapping[str, QuantizedMatrix], left_out: frozenset[str] = frozenset()
    ) -> None:
        self._source, self._matrices = source, dict(matrices)
        self._hidden = left_out.union(part for matrix in self._matrices.values() for part in matrix.parts)

    def specs(self) -> dict[str, TensorSpec]:
        kept = {name: spec for name, spec in self._source.specs().items() if name not in self._hidden}
        return kept | {name: TensorSpec(matrix.shape, FLOAT32) for name, matrix in self._matrices.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if name not in self._matrices:
            if name in self._hidden:
                raise CheckpointError(f"no tensor {name!r}.{did_you_mean(name, self.specs())}")
            return self._source.read(name, index)
        matrix = self._matrices[name]
        rows, columns = block_bounds(matrix.shape, index)
        return matrix.rows(self._source, *rows)[:, slice(*columns)]


def unpack_last(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of `bits` bits from the words of the last axis, the first in the low bits: [..., W] -> [..., W K] uint8."""
    shifts_K = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words.view(np.uint32)[..., None] >> shifts_K) & np.uint32(2**bits - 1)
    return codes.astype(np.uint8).reshape(*words.shape[:-1], -1)


def unpack_first(words: np.ndarray, bits: int) -> np.ndarray:
    """`unpack_last` for words along the first axis: [W, ...] -> [W K, ...]."""
    return np.moveaxis(unpack_last(np.ascontiguousarray(np.moveaxis(words, 0, -1)), bits), -1, 0)
