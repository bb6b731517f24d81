"""A PEFT folder: its two files, their keys, and the fields of adapter_config.json that all kinds of adapter share.

Format: adapter_config.json and adapter_model.safetensors, whose keys are `base_model.model.<module>.<parameter>`
(PEFT 0.21).
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxft.adapters.attach import slots
from jaxft.adapters.saved import saved_paths
from jaxft.checkpoint.finite import FiniteSource
from jaxft.checkpoint.hf import EMBEDDING, TIED_HEAD, param_tensors
from jaxft.checkpoint.tensors import SafetensorsFolder, TensorSource, TensorSpec
from jaxft.errors import CheckpointError, ModelError, listed
from jaxft.models.nested import text_name
from jaxft.models.tensor_map import SAME, Piece, Transform
from jaxft.nn.decoder import Decoder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SCORE_TASK = "SEQ_CLS"  # task_type of a reward model's adapter
# Fields about training or bookkeeping: they do not change what the adapter computes.
HARMLESS = (
    "task_type", "inference_mode", "revision", "auto_mapping", "runtime_config", "peft_version",
    "base_model_name_or_path", "peft_type", "modules_to_save", "ensure_weight_tying",
)  # fmt: skip
# `read(rows, columns)` gives a block of a matrix of the base, `read(rows)` of a vector: Hugging Face's layout, float32.
ReadBlock = Callable[..., np.ndarray]
# `merge(read, rows, columns)` gives the merged block, float32.
MergeBlock = Callable[..., np.ndarray]


@dataclass(frozen=True)
class PeftTensor:
    """One tensor of a folder, or a part of one, and its place in a model with the adapter.

    path: of our parameter. index: the part of our parameter. transform: from that part to PEFT's layout and back.
    part: the slices of the folder's tensor, if that tensor holds several of our parameters; else None.
    """

    key: str
    path: str
    index: tuple[int | slice, ...] = ()
    transform: Transform = SAME
    part: tuple[slice, ...] | None = None


class PeftSource(TensorSource, Protocol):
    """The tensors of a PEFT folder by key."""

    def drop(self, keys: Collection[str]) -> "PeftSource":
        """The same source without the tensors of these keys."""
        ...


class AdapterTensors:
    """The tensors of a PEFT folder, under the keys that they have with a text-only base.

    PEFT's keys follow transformers' module names, which are nested one level deeper in a base that takes images too.
    Raises CheckpointError if two keys mean one tensor, and for NaN or infinite values when they are read.
    """

    def __init__(self, folder: str) -> None:
        self._source = FiniteSource(SafetensorsFolder(folder, WEIGHTS))
        self._source_names: dict[str, str] = {}
        for source_name in self._source.specs():
            module = source_name.removeprefix(PREFIX)
            key = source_name if module == source_name else PREFIX + (text_name(module) or module)
            if key in self._source_names:
                raise CheckpointError(
                    f"{folder}: {self._source_names[key]} and {source_name} are the same tensor of the base"
                )
            self._source_names[key] = source_name

    def drop(self, keys: Collection[str]) -> "AdapterTensors":
        others = copy.copy(self)
        others._source_names = {key: source_name for key, source_name in self._source_names.items() if key not in keys}
        return others

    def specs(self) -> dict[str, TensorSpec]:
        specs = self._source.specs()
        return {key: specs[source_name] for key, source_name in self._source_names.items()}

    def read(self, key: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._source.read(self._source_names[key], index)


def refuse_unknown(config: Mapping[str, Any], understood: Callable[[str, Any], bool]) -> None:
    """Raises ModelError naming each field of an adapter_config.json that would change what the adapter computes.

    understood(name, value): whether the kind of adapter reads the field, or the value has no effect. A field that is
    empty, false or zero counts as not set.
    """
    refused = [
        f"{name}={value!r}"
        for name, value in sorted(config.items())
        if value and name not in HARMLESS and not understood(name, value)
    ]
    if refused:
        raise ModelError(f"adapter_config.json has settings that are not implemented: {', '.join(refused)}")


def modules(model: Decoder) -> Iterator[tuple[str, str, Piece]]:
    """(PEFT's module, path of our layer, position in that layer) of every matrix that may have an adapter."""
    layers = dict(slots(model))
    for path, param in param_tensors(model).items():
        layer, _, name = path.rpartition("/")
        if layer in layers and name in ("kernel", "embedding"):
            for piece in param.pieces:
                yield PREFIX + piece.hf.removesuffix(".weight"), layer, piece


def saved_tensors(model: Decoder) -> Iterator[PeftTensor]:
    """The folder's tensors of modules that were trained in full alongside the adapters (modules_to_save)."""
    table = param_tensors(model)
    for path in saved_paths(model):
        for piece in table[path].pieces:
            yield PeftTensor(PREFIX + piece.hf, path, piece.at, table[path].transform)
            if piece.hf == EMBEDDING and model.tied:
                yield PeftTensor(PREFIX + TIED_HEAD, path, piece.at, table[path].transform)  # PEFT has it twice


def misfit_error(problems: Sequence[str]) -> CheckpointError:
    """The error for an adapter that cannot be merged into its base. problems: one line each; none if it is empty."""
    lines = listed(problems or ["it holds no adapter at all"], 20, lines=True)
    return CheckpointError(f"the adapter does not fit its base:\n{lines}")


def layers_named(model: Decoder, keys: Collection[str], prefix: str, folder: str) -> tuple[str, ...]:
    """Paths of the layers that keys of the form `<module>.<prefix>...` name.

    Raises CheckpointError if there is no key, or a key has another form or names no layer of the model.
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
