"""A base model merged with a PEFT folder's adapter, as one source of tensors, merged in float32 while they are read."""

import functools
import os
from collections.abc import Callable, Iterable

import numpy as np

from jaxft.checkpoint.hf import TIED_HEAD
from jaxft.checkpoint.peft import kind_of, saved_modules, whole_keys
from jaxft.checkpoint.peft.folder import CONFIG, PREFIX, SCORE_TASK, AdapterTensors, PeftSource
from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.paths import read_json


class MergedSource:
    """The base's tensors with an adapter merged into them: the changed ones in float32, the others as they are.

    base: under Hugging Face names. folder: a PEFT folder.
    Raises ModelError for a kind of adapter that does not change the weights and for settings that are not implemented,
    and CheckpointError listing tensors that do not fit the base.
    """

    def __init__(self, base: TensorSource, folder: str | os.PathLike[str]) -> None:
        self.base, self.path = base, os.fspath(folder)
        config = read_json(os.path.join(self.path, CONFIG))
        if config.get("task_type") == SCORE_TASK:
            raise ModelError(
                f"{self.path} is the adapter of a reward model, whose base has no score head. Merge it with `jaxft "
                "export --model=FOLDER --format=merged`."
            )
        kind = kind_of(config)
        if not hasattr(kind, "merge_blocks"):
            raise ModelError(
                f"{self.path} has peft_type {kind.PEFT_TYPE}, which does not change the base's weights: it cannot be "
                "merged. Serve the folder on its base."
            )
        source: PeftSource = AdapterTensors(self.path)
        if hasattr(kind, "normalize"):
            config, source = kind.normalize(config, source, base.specs())
        tied = TIED_HEAD not in base.specs()
        names = saved_modules(config, tied=tied, folder=self.path)
        whole = whole_keys(source, names, self.path, tied=tied)
        try:
            copies = {PREFIX + TIED_HEAD} if tied else set()
            self._whole = _whole_tensors(base, source, set(whole) - copies)
            self._merge_blocks = kind.merge_blocks(base, config, source.drop(whole))
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def specs(self) -> dict[str, TensorSpec]:
        changed = self._merge_blocks.keys() | self._whole.keys()
        return {
            name: TensorSpec(spec.shape, np.dtype(np.float32)) if name in changed else spec
            for name, spec in self.base.specs().items()
        }

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if name in self._whole:
            return self._whole[name](index)
        if name not in self._merge_blocks:
            return self.base.read(name, index)

        def block(*bounds: tuple[int, int]) -> np.ndarray:
            return self.base.read(name, tuple(slice(*axis) for axis in bounds)).astype(np.float32)

        return self._merge_blocks[name](block, *block_bounds(self.base.specs()[name].shape, index))


def _whole_tensors(
    base: TensorSource, source: PeftSource, whole: Iterable[str]
) -> dict[str, Callable[[tuple[slice, ...] | None], np.ndarray]]:
    """How to read the tensors that were trained in full, by the base's names for them."""
    specs = base.specs()
    out: dict[str, Callable[[tuple[slice, ...] | None], np.ndarray]] = {}
    for key in whole:
        name = key.removeprefix(PREFIX)
        shape = source.specs()[key].shape
        if name not in specs or specs[name].shape != shape:
            raise CheckpointError(f"{key} {list(shape)} is not a tensor of the base")
        out[name] = functools.partial(_float32, source, key)
    return out


def _float32(source: PeftSource, key: str, index: tuple[slice, ...] | None) -> np.ndarray:
    return source.read(key, index).astype(np.float32)
