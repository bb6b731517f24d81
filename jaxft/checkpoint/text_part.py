"""The language model's tensors of a model that takes images too, under their names in a text-only model."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError, did_you_mean, listed
from jaxft.models.nested import image_part, text_name

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROWS = 256  # read at a time to tell a head from the embedding: almost always the first block is enough


class TextPart:
    """A source without the tensors that only images use. left_out: a sentence that names them.

    is_for_prediction: of FamilyConfig. Raises CheckpointError for tensors that belong to neither part, and for two that
    have one name.
    """

    def __init__(
        self, source: TensorSource, model_type: str, is_for_prediction: Callable[[str], bool] = lambda name: False
    ) -> None:
        self._source = source
        self._source_names: dict[str, str] = {}
        images: dict[str, str] = {}
        strays: list[str] = []
        for source_name, spec in source.specs().items():
            name, part = text_name(source_name, model_type), image_part(source_name, model_type)
            if name is None and part is None and is_for_prediction(source_name):
                name = source_name  # left out with those of text-only models
            if part is not None:
                images[source_name] = part
            elif name is None:
                strays.append(f"{source_name} {list(spec.shape)}")
            elif name in self._source_names:
                raise CheckpointError(
                    f"tensor {name!r} is there as {self._source_names[name]!r} and as {source_name!r}"
                )
            else:
                self._source_names[name] = source_name
        if strays:
            raise CheckpointError(
                f"{len(strays)} tensors belong neither to the language model of {model_type!r} nor to its parts for "
                f"images:\n{listed(strays, 40, lines=True)}"
            )
        self.left_out = _describe(
            model_type, Counter(images.values()), sum(source.specs()[name].size for name in images)
        )

    def specs(self) -> dict[str, TensorSpec]:
        specs = self._source.specs()
        return {name: specs[source_name] for name, source_name in self._source_names.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if name not in self._source_names:
            raise CheckpointError(f"no tensor {name!r} in the language model.{did_you_mean(name, self._source_names)}")
        return self._source.read(self._source_names[name], index)

    def own_head(self) -> bool:
        """Whether there is an LM head that is not a copy of the embedding."""
        specs = self.specs()
        if HEAD not in specs or EMBEDDING not in specs or specs[HEAD] != specs[EMBEDDING]:
            return HEAD in specs
        cuts = [(slice(row, row + ROWS),) for row in range(0, specs[HEAD].shape[0], ROWS)]
        return not all(np.array_equal(self.read(HEAD, cut), self.read(EMBEDDING, cut)) for cut in cuts)


def _describe(model_type: str, parts: Counter[str], numbers: int) -> str:
    if not parts:
        return f"{model_type}: text only; the folder has no tensors for images"
    listed = ", ".join(f"{part} ({count})" for part, count in sorted(parts.items()))
    return f"{model_type}: text only; {parts.total()} tensors of {numbers:,} numbers are left out: {listed}"
