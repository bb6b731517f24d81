"""A PEFT folder: its two files, their keys, and what any kind of adapter says of itself in adapter_config.json.

Format: adapter_config.json and adapter_model.safetensors, whose keys are `base_model.model.<module>.<what of it>`
(PEFT 0.21).
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from jaxft.adapters.attach import slots
from jaxft.adapters.saved import saved_paths
from jaxft.checkpoint.finite import Finite
from jaxft.checkpoint.hf import EMBEDDING, TIED_HEAD, param_tensors
from jaxft.checkpoint.tensors import SafetensorsFolder, TensorSpec
from jaxft.errors import CheckpointError, ModelError
from jaxft.models.nested import text_name
from jaxft.models.tensor_map import SAME, Piece, Transform

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# How training began or is to go on, and for whom, not what the adapter computes.
HARMLESS = (
    "task_type", "inference_mode", "revision", "auto_mapping", "runtime_config", "peft_version",
    "base_model_name_or_path", "peft_type", "modules_to_save", "ensure_weight_tying",
)  # fmt: skip
# `read(rows, columns)` gives a block of a base's matrix, `read(rows)` of a vector: Hugging Face's layout, float32.
ReadBlock = Callable[..., np.ndarray]
# `merge(read, rows, columns)`: what a block is after merging, float32.
MergeBlock = Callable[..., np.ndarray]


@dataclass(frozen=True)
class PeftTensor:
    """One tensor of a folder, and where it is in a model that has the adapter.

    path: of our parameter. index: the part of it. transform: from that part to PEFT's layout and back. part: where it
    is in the tensor, which then holds several.
    """

    key: str
    path: str
    index: tuple[int | slice, ...] = ()
    transform: Transform = SAME
    part: tuple[slice, ...] | None = None


class AdapterTensors:
    """The tensors of a PEFT folder, under the keys that they have with a base of text only.

    PEFT takes a key from where transformers has the module; with a base that takes images too, that is inside it.
    Raises CheckpointError where two keys mean one tensor, and for NaN or infinite values when they are read.
    """

    def __init__(self, folder: str) -> None:
        self._source, self._stored = Finite(SafetensorsFolder(folder, WEIGHTS)), {}
        for stored in self._source.specs():
            module = stored.removeprefix(PREFIX)
            key = stored if module == stored else PREFIX + (text_name(module) or module)
            if key in self._stored:
                raise CheckpointError(f"{folder}: {self._stored[key]} and {stored} are the same tensor of the base")
            self._stored[key] = stored

    def without(self, keys: Collection[str]) -> "AdapterTensors":
        """The others."""
        others = copy.copy(self)
        others._stored = {key: stored for key, stored in self._stored.items() if key not in keys}
        return others

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor."""
        specs = self._source.specs()
        return {key: specs[stored] for key, stored in self._stored.items()}

    def read(self, key: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or a block of it; see `TensorSource.read`."""
        return self._source.read(self._stored[key], index)


def refuse_unknown(config: Mapping[str, Any], understood: Callable[[str, Any], bool]) -> None:
    """Raises ModelError naming each field of an adapter_config.json that would change what the adapter computes.

    understood(name, value): whether a kind of adapter reads the field, or the value is without effect. A field that is
    empty, false or zero is taken as not set.
    """
    refused = [
        f"{name}={value!r}"
        for name, value in sorted(config.items())
        if value and name not in HARMLESS and not understood(name, value)
    ]
    if refused:
        raise ModelError(f"adapter_config.json has settings that are not implemented: {', '.join(refused)}")


def modules(model: nnx.Module) -> Iterator[tuple[str, str, Piece]]:
    """(PEFT's module, path of our layer, its place there) of every matrix that may have an adapter."""
    layers = dict(slots(model))
    for path, placed in param_tensors(model).items():
        layer, _, name = path.rpartition("/")
        if layer in layers and name in ("kernel", "embedding"):
            for piece in placed.pieces:
                yield PREFIX + piece.hf.removesuffix(".weight"), layer, piece


def saved(model: nnx.Module) -> Iterator[PeftTensor]:
    """The tensors that a folder has of the modules that were trained whole beside the adapters (modules_to_save)."""
    table = param_tensors(model)
    for path in saved_paths(model):
        for piece in table[path].pieces:
            yield PeftTensor(PREFIX + piece.hf, path, piece.at, table[path].transform)
            if piece.hf == EMBEDDING and model.lm_head is None:
                yield PeftTensor(PREFIX + TIED_HEAD, path, piece.at, table[path].transform)  # PEFT has it twice


def layers_named(model: nnx.Module, keys: Collection[str], prefix: str, folder: str) -> tuple[str, ...]:
    """Paths of the layers that keys of the form `<module>.<prefix>...` name.

    Raises CheckpointError where one is of another form or names no layer of the model, or there is none.
    """
    paths = {module: layer for module, layer, _ in modules(model)}
    named = {key: key.rpartition(f".{prefix}")[0] for key in keys}
    unknown = [key for key, module in named.items() if module not in paths]
    if unknown or not keys:
        raise CheckpointError(
            f"{folder}: {len(unknown)} of {len(keys)} tensors name no layer of the model, "
            f"among them {unknown[:3]}. Keys are {PREFIX}<module>.{prefix}..."
        )
    return tuple(sorted({paths[module] for module in named.values()}))
