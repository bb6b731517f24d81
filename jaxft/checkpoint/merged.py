"""A base model merged with a PEFT folder's adapter, as one source of tensors, merged in float32 while they are read."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.checkpoint.peft import PeftFolder, open_adapter
from jaxft.checkpoint.peft.base import TokenRows
from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds
from jaxft.errors import CheckpointError, ModelError


class MergedSource:
    """The base's tensors with an adapter merged into them: the changed ones in float32, the others as they are.

    base: under Hugging Face names. folder: a PEFT folder. hf_config: config.json of the base; as an attribute, that of
    the merged model, whose tables may be untied, or have other sizes. notes: as in LoadedModel.
    Raises ModelError for a kind of adapter that does not change the weights and for settings that are not implemented,
    and CheckpointError listing tensors that do not fit the base.
    """

    def __init__(
        self, base: TensorSource, folder: str | os.PathLike[str], hf_config: Mapping[str, Any] | None = None
    ) -> None:
        opened = open_adapter(os.fspath(folder))
        self.path = opened.path
        if opened.is_score:
            raise ModelError(
                f"{self.path} is the adapter of a reward model, whose base has no score head. Merge it with `jaxft "
                "export --model=FOLDER --format=merged`."
            )
        kind = opened.kind
        if not hasattr(kind, "merge_blocks"):
            raise ModelError(
                f"{self.path} has peft_type {kind.PEFT_TYPE}, which does not change the base's weights: it cannot be "
                "merged. Serve the folder on its base."
            )
        change = opened.change(base, hf_config)
        self.base, self.notes = change.source, change.notes
        self.hf_config = None if hf_config is None else change.hf_config(hf_config)
        self._rows, self._trained, self._opened = change.rows, change.trained, opened
        config, source = opened.config, opened.tensors
        try:
            if hasattr(kind, "normalize"):
                config, source = kind.normalize(config, source, base.specs())
            has_halves = source.specs() or not (change.rows or change.trained or change.carried)
            self._merge_blocks = kind.merge_blocks(self.base, config, source) if has_halves else {}
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def specs(self) -> dict[str, TensorSpec]:
        changed = self._merge_blocks.keys() | self._trained | self._rows.keys()
        return {
            name: TensorSpec(spec.shape, np.dtype(np.float32)) if name in changed else spec
            for name, spec in self.base.specs().items()
        }

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if name in self._rows:
            return _with_rows(self.base, name, self._opened, self._rows[name], index)
        if name not in self._merge_blocks:
            value = self.base.read(name, index)
            return value.astype(np.float32) if name in self._trained else value

        def block(*bounds: tuple[int, int]) -> np.ndarray:
            return self.base.read(name, tuple(slice(*axis) for axis in bounds)).astype(np.float32)

        return self._merge_blocks[name](block, *block_bounds(self.base.specs()[name].shape, index))


def _with_rows(
    base: TensorSource, name: str, opened: PeftFolder, rows: TokenRows, index: tuple[slice, ...] | None
) -> np.ndarray:
    """A block of a table with the rows of single tokens in their places."""
    (start, stop), *columns = block_bounds(base.specs()[name].shape, index)
    table = base.read(name, index).astype(np.float32)
    values = opened.tensors.files.read(rows.key).astype(np.float32)[:, *(slice(*axis) for axis in columns)]
    for token, row in zip(rows.indices, values, strict=True):
        if start <= token < stop:
            table[token - start] = row
    return table
