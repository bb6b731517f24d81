"""IA3 in PEFT's folders: `<module>.ia3_l` [O, 1], or [1, I] where a feed-forward layer's inputs are scaled."""

# I inputs, O outputs

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from jaxft.adapters.attach import adapters
from jaxft.adapters.ia3 import attach_ia3
from jaxft.checkpoint.peft.folder import (
    PREFIX,
    AdapterTensors,
    MergeBlock,
    PeftTensor,
    ReadBlock,
    layers_named,
    modules,
    refuse_unknown,
)
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError
from jaxft.models.tensor_map import Index, Transform

PEFT_TYPE = "IA3"
READ = ("target_modules", "feedforward_modules", "init_ia3_weights")


@dataclass(frozen=True)
class Lined(Transform):
    """A vector that PEFT keeps as a column, or as a row of a matrix."""

    column: bool

    def hf_index(self, index: Index) -> Index:
        """As `Transform.hf_index`."""
        return (*index, slice(None)) if self.column else (slice(None), *index)

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """As `Transform.hf_shape`."""
        return (*shape, 1) if self.column else (1, *shape)

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        """As `Transform.from_hf`."""
        return array.reshape(-1)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """As `Transform.to_hf`."""
        return array.reshape(self.hf_shape(array.shape))


def put(model: nnx.Module, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], folder: str) -> tuple[str, ...]:
    """Attaches adapters to the layers that a folder's keys name, values still to be read.

    PEFT goes by the names in feedforward_modules; the shapes of the tensors must say the same.
    """
    refuse_unknown(config, lambda name, value: name in READ)
    paths = layers_named(model, specs, "ia3_l", folder)
    inward = {
        path for module, path, _ in modules(model)
        if path in paths and _is_named(config.get("feedforward_modules"), module.removeprefix(PREFIX))
    }  # fmt: skip
    return attach_ia3(model, paths, sorted(inward))


def stored(model: nnx.Module) -> Iterator[PeftTensor]:
    """The tensors that a folder has of a model's adapters."""
    attached = adapters(model)
    for module, path, piece in modules(model):
        if path in attached:
            column = not attached[path].feedforward
            yield PeftTensor(f"{module}.ia3_l", f"{path}/adapter/factors", piece.at, Lined(column=column))


def fields(model: nnx.Module) -> dict[str, Any]:
    """What adapter_config.json says of a model's adapters."""
    attached = adapters(model)
    inward = {path.rsplit("/", 1)[-1] for path, adapter in attached.items() if adapter.feedforward}
    targets = {path.rsplit("/", 1)[-1] for path in attached}
    return {"target_modules": sorted(targets), "feedforward_modules": sorted(inward), "init_ia3_weights": True}


def merging(base: TensorSource, config: Mapping[str, Any], source: AdapterTensors) -> dict[str, MergeBlock]:
    """How the base's matrices and biases, by name, are merged.

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
        listed = "\n  ".join(problems[:20] or ["it holds no adapter at all"])
        raise CheckpointError(f"the adapter does not fit its base:\n  {listed}")
    return out


def _scaled(factors: np.ndarray, *, axis: int) -> MergeBlock:
    def merge(read: ReadBlock, *bounds: tuple[int, int]) -> np.ndarray:
        value = read(*bounds)
        shape = [1] * value.ndim
        shape[axis] = -1
        return value * factors[slice(*bounds[axis])].reshape(shape)

    return merge


def _is_named(names: Any, module: str) -> bool:
    """As PEFT finds feed-forward modules: by a pattern of the whole name, or a list of its ends."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module.endswith(name) for name in names or ())
