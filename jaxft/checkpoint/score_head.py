"""A language model's tensors as those of a reward model, whose score head is still to be trained."""

import numpy as np

from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.checkpoint.text_part import HEAD

SCORE = "score.weight"


class FreshScoreHead:
    """A source without the LM head, and with a score head of zeros. width: of the hidden vectors."""

    def __init__(self, source: TensorSource, width: int) -> None:
        self._source, self._width = source, width

    def specs(self) -> dict[str, TensorSpec]:
        kept = {name: spec for name, spec in self._source.specs().items() if name != HEAD}
        return kept | {SCORE: TensorSpec((1, self._width), np.dtype(np.float32))}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if name == SCORE:
            return np.zeros((1, self._width), np.float32)[index or ()]
        return self._source.read(name, index)
