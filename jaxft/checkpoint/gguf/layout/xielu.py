"""The numbers of Apertus's activation: four a layer, which GGUF files keep in their metadata."""

from collections.abc import Mapping

import numpy as np

from jaxft.checkpoint.safetensors_writer import LazyTensor
from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.gguf.header import GGUFHeader

# Hugging Face's names within `model.layers.N.mlp.act_fn.`, and the shapes of the tensors. GGUF's keys: `xielu.NAME`.
NUMBERS: dict[str, tuple[int, ...]] = {"alpha_n": (1,), "alpha_p": (1,), "beta": (), "eps": ()}
MODULE = ".mlp.act_fn."


def without_numbers(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors that are tensors in GGUF too."""
    return {name: tensor for name, tensor in tensors.items() if MODULE not in name}


def xielu_metadata(tensors: Mapping[str, LazyTensor], layers: int) -> dict[str, list[float]]:
    """The numbers of all layers by GGUF's keys; nothing for a model without them."""
    if not any(MODULE in name for name in tensors):
        return {}

    def number(layer: int, part: str) -> float:
        return float(tensors[f"model.layers.{layer}{MODULE}{part}"][1]().astype(np.float32).reshape(()))

    return {f"xielu.{part}": [number(layer, part) for layer in range(layers)] for part in NUMBERS}


class WithNumbers:
    """A file's tensors and the numbers of its metadata, under the names of Hugging Face's files.

    Raises CheckpointError if a number is missing, ModelError for values that are no numbers.
    """

    def __init__(self, source: TensorSource, header: GGUFHeader, layers: int) -> None:
        self._source, self._numbers = source, dict[str, np.ndarray]()
        for part, shape in NUMBERS.items():
            values = np.asarray(header.require(f"xielu.{part}"))
            if values.dtype.kind != "f" or values.ndim > 1:
                raise ModelError(f"{header.path}: xielu.{part} is not a list of one number for each layer")
            values = np.broadcast_to(values, (layers,)) if values.ndim == 0 else values
            if len(values) != layers:
                raise CheckpointError(f"{header.path}: xielu.{part} has {len(values)} numbers for {layers} layers")
            for layer, value in enumerate(values):
                self._numbers[f"model.layers.{layer}{MODULE}{part}"] = np.full(shape, value, np.float32)

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, without reading one."""
        return self._source.specs() | {name: TensorSpec(v.shape, v.dtype) for name, v in self._numbers.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """As `TensorSource.read`."""
        if name not in self._numbers:
            return self._source.read(name, index)
        values = self._numbers[name]
        return values[tuple(slice(*bounds) for bounds in block_bounds(values.shape, index))].copy()
