"""The language model's tensors of a folder whose model takes images too, under the names that it has alone."""

from collections import Counter

import numpy as np

from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError, did_you_mean
from jaxft.models.nested import image_part, text_name

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROWS = 256  # read at a time to tell a head from the embedding: almost always the first are enough


class TextPart:
    """A source without the tensors that only images go through, of which `left_out` tells.

    Raises CheckpointError for tensors that are of neither part, and for two that have one name.
    """

    def __init__(self, source: TensorSource, model_type: str) -> None:
        self._source, self._stored = source, {}
        images, strays = {}, []
        for stored, spec in source.specs().items():
            name, part = text_name(stored), image_part(stored)
            if part is not None:
                images[stored] = part
            elif name is None:
                strays.append(f"{stored} {list(spec.shape)}")
            elif name in self._stored:
                raise CheckpointError(f"tensor {name!r} is there as {self._stored[name]!r} and as {stored!r}")
            else:
                self._stored[name] = stored
        if strays:
            raise CheckpointError(
                f"{len(strays)} tensors are neither of the language model of {model_type!r} nor of its parts for "
                "images:\n  " + "\n  ".join(strays[:40])
            )
        self.left_out = _said(model_type, Counter(images.values()), sum(source.specs()[name].size for name in images))

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor of the language model."""
        specs = self._source.specs()
        return {name: specs[stored] for name, stored in self._stored.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or a block of it; see `TensorSource.read`."""
        if name not in self._stored:
            raise CheckpointError(f"no tensor {name!r} in the language model.{did_you_mean(name, self._stored)}")
        return self._source.read(self._stored[name], index)

    def own_head(self) -> bool:
        """Whether there is an LM head, and it is not the embedding once more."""
        specs = self.specs()
        if HEAD not in specs or EMBEDDING not in specs or specs[HEAD] != specs[EMBEDDING]:
            return HEAD in specs
        cuts = [(slice(row, row + ROWS),) for row in range(0, specs[HEAD].shape[0], ROWS)]
        return not all(np.array_equal(self.read(HEAD, cut), self.read(EMBEDDING, cut)) for cut in cuts)


def _said(model_type: str, parts: Counter[str], numbers: int) -> str:
    if not parts:
        return f"{model_type}: text only; the folder has no tensors for images"
    listed = ", ".join(f"{part} ({count})" for part, count in sorted(parts.items()))
    return f"{model_type}: text only; {parts.total()} tensors of {numbers:,} numbers are left out: {listed}"
