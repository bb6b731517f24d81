"""A base model and a PEFT folder's LoRA as one source of tensors, merged in float32 as they are read."""

# I inputs, O outputs, r rank

import os

import numpy as np

from jaxft.checkpoint import peft
from jaxft.checkpoint.paths import read_json
from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds
from jaxft.errors import CheckpointError


class Merged:
    """The base's tensors, those with an adapter as float32 `W + scale B A`.

    base: under Hugging Face names. folder: a PEFT folder. Only the adapter's small tensors stay in memory.
    Raises ModelError for settings not implemented, and CheckpointError listing tensors that name no
    matrix of the base, lack their other half or have another shape.
    """

    def __init__(self, base: TensorSource, folder: str | os.PathLike[str]) -> None:
        self.base, self.path = base, os.fspath(folder)
        settings = peft.read_settings(read_json(os.path.join(self.path, peft.CONFIG)))
        self._scale, self._halves = np.float32(settings.scale), _halves(base, self.path, settings.r)

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor."""
        return {
            name: TensorSpec(spec.shape, np.dtype(np.float32)) if name in self._halves else spec
            for name, spec in self.base.specs().items()
        }

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or a block of it; see `TensorSource.read`."""
        value = self.base.read(name, index)
        if name not in self._halves:
            return value
        a_rI, b_Or = self._halves[name]
        rows, columns = block_bounds(self.base.specs()[name].shape, index)
        delta = b_Or[slice(*rows)] @ a_rI[:, slice(*columns)]
        delta *= self._scale
        delta += value
        return delta


def _halves(base: TensorSource, folder: str, r: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    source, matrices = peft.AdapterTensors(folder), base.specs()
    found: dict[str, dict[str, str]] = {}
    problems = []
    for key, spec in source.specs().items():
        module, _, part = key.removeprefix(peft.PREFIX).removesuffix(".weight").rpartition(".")
        name = f"{module}.weight"
        if not key.startswith(peft.PREFIX) or len(matrices[name].shape if name in matrices else ()) != 2:
            problems.append(f"{key} names no linear layer of the base")
        elif part == "base_layer" and np.array_equal(source.read(key), base.read(name)):
            continue  # beside an adapter on the LM head PEFT stores the head itself
        elif part not in ("lora_A", "lora_B"):
            problems.append(f"{key} is not lora_A or lora_B")
        else:
            outputs, inputs = matrices[name].shape
            expected = (r, inputs) if part == "lora_A" else (outputs, r)
            if spec.shape != expected:
                problems.append(f"{key} is {list(spec.shape)}, the base wants {list(expected)}")
            found.setdefault(name, {})[part] = key
    problems += [f"{name} has {', '.join(parts)} only" for name, parts in found.items() if len(parts) != 2]
    if problems or not found:
        listed = "\n  ".join(problems[:20] or ["it holds no adapter at all"])
        raise CheckpointError(f"the adapter in {folder} does not fit its base:\n  {listed}")
    read = {name: [source.read(parts[k]).astype(np.float32) for k in sorted(parts)] for name, parts in found.items()}
    return {name: (a, b) for name, (a, b) in read.items()}
