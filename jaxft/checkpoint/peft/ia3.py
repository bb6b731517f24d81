"""IA3 in PEFT's folders: `<module>.ia3_l` [O, 1], or [1, I] if a feed-forward layer's inputs are scaled."""

# I inputs, O outputs

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from jaxft.adapters.attach import adapters, last_name
from jaxft.adapters.ia3 import IA3, attach_ia3
from jaxft.checkpoint.peft.folder import (
    PREFIX,
    MergeBlock,
    PeftTensor,
    ReadBlock,
    layers_named,
    misfit_error,
    modules,
    refuse_unknown,
)
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.files.patterns import matches
from jaxft.models.tensor_map import Index, Transform
from jaxft.nn.decoder import Decoder

PEFT_TYPE = "IA3"
READ = ("target_modules", "feedforward_modules", "init_ia3_weights")


@dataclass(frozen=True)
class VectorAsMatrix(Transform):
    """A vector that PEFT keeps as a matrix of one column, or of one row."""

    column: bool

    def hf_index(self, index: Index) -> Index:
        return (*index, slice(None)) if self.column else (slice(None), *index)

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape, 1) if self.column else (1, *shape)

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(-1)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.hf_shape(array.shape))


def attach_to(
    model: Decoder, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], folder: str
) -> tuple[str, ...]:
    """Attaches adapters to the layers that a folder's keys name, values still to be read.

    PEFT tells feed-forward layers by feedforward_modules; the shapes of the tensors must agree.
    """
    refuse_unknown(config, lambda name, value: name in READ)
    paths = layers_named(model, specs, "ia3_l", folder)
    inward = {
        path for module, path, _ in modules(model)
        if path in paths and _is_named(config.get("feedforward_modules"), module.removeprefix(PREFIX))
    }  # fmt: skip
    return attach_ia3(model, paths, sorted(inward))


def peft_tensors(model: Decoder) -> Iterator[PeftTensor]:
    """The folder's tensors for a model's adapters."""
    attached = cast(dict[str, IA3], adapters(model))
    for module, path, piece in modules(model):
        if path in attached:
            column = not attached[path].feedforward
            yield PeftTensor(f"{module}.ia3_l", f"{path}/adapter/factors", piece.at, VectorAsMatrix(column=column))


def adapter_config_fields(model: Decoder) -> dict[str, Any]:
    """The fields of adapter_config.json for a model's adapters."""
    attached = cast(dict[str, IA3], adapters(model))
    names = {path: last_name(path).replace("/", ".") for path in attached}
    inward = {names[path] for path, adapter in attached.items() if adapter.feedforward}
    targets = set(names.values())
    return {"target_modules": sorted(targets), "feedforward_modules": sorted(inward), "init_ia3_weights": True}


def merge_blocks(base: TensorSource, config: Mapping[str, Any], source: TensorSource) -> dict[str, MergeBlock]:
    """How each of the base's matrices and biases is merged, by its name.

    Raises ModelError for settings not implemented, and CheckpointError listing tensors that name no matrix of the base
    or have another shape.
    """
    refuse_unknown(config, lambda name, value: name in READ)
    specs, problems, out = base.specs(), [], {}
    for key, spec in source.specs().items():
        module = key.removeprefix(PREFIX).removesuffix(".ia3_l")
        name, inward = f"{module}.weight", _is_named(config.get("feedforward_modules"), module)
        if not (key.startswith(PREFIX) and key.endswith(".ia3_l") and name in specs and len(specs[name].shape) == 2):
            problems.append(f"{key} names no linear layer of the base")
            continue
        outputs, inputs = specs[name].shape
        expected = (1, inputs) if inward else (outputs, 1)
        if spec.shape != expected:
            problems.append(f"{key} is {list(spec.shape)}, the base wants {list(expected)}")
            continue
        factors = source.read(key).astype(np.float32).reshape(-1)
        out[name] = _scaled(factors, axis=int(inward))
        if not inward and f"{module}.bias" in specs:
            out[f"{module}.bias"] = _scaled(factors, axis=0)
    if problems or not out:
        raise misfit_error(problems)
    return out


def _scaled(factors: np.ndarray, *, axis: int) -> MergeBlock:
    def merge(read: ReadBlock, *bounds: tuple[int, int]) -> np.ndarray:
        value = read(*bounds)
        shape = [1] * value.ndim
        shape[axis] = -1
        return value * factors[slice(*bounds[axis])].reshape(shape)

    return merge


def _is_named(names: Any, module: str) -> bool:
    """Whether PEFT takes a module for a feed-forward one: by a pattern of its whole name, or a list of name endings."""
    if isinstance(names, str):
        return matches(names, module)
    return any(module.endswith(name) for name in names or ())
