"""Layers of experts that a file keeps in two tensors, read as the matrices of single experts.

transformers 5 has them so in memory, and writes them so with `save_original_format=False`:
`mlp.experts.gate_up_proj` [E, 2 F, D], the gates before the ups, and `mlp.experts.down_proj` [E, D, F].
"""

# E experts, F inner units of an expert, D model

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds
from jaxft.errors import CheckpointError, did_you_mean

# What the families call the layer, and an expert's gate, up and down, in files of single matrices.
SINGLE = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
_FUSED = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_ROUTER = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.weight")


@dataclass(frozen=True)
class _Part:
    """Where a matrix is: expert and rows of a stored tensor; all of it where there is no expert."""

    stored: str
    spec: TensorSpec
    expert: int | None = None
    first_row: int = 0


def is_fused(model_type: str, source: TensorSource) -> bool:
    """Whether a source keeps experts in this form."""
    return model_type in SINGLE and any(_FUSED.fullmatch(name) for name in source.specs())


class SingleExperts:
    """A source with the names that `model_type` has with one matrix for each expert; other tensors stay as they are.

    Raises CheckpointError for a fused tensor of another form, and where a matrix is there twice.
    """

    def __init__(self, source: TensorSource, model_type: str) -> None:
        self._source, self._parts = source, {}
        for stored, spec in source.specs().items():
            for name, part in _parts(stored, spec, SINGLE[model_type]):
                if name in self._parts:
                    raise CheckpointError(f"{name} is in {self._parts[name].stored} and in {stored}")
                self._parts[name] = part

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor."""
        return {name: part.spec for name, part in self._parts.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or a block of it; see `TensorSource.read`."""
        if name not in self._parts:
            raise CheckpointError(f"no tensor {name!r}.{did_you_mean(name, self._parts)}")
        part = self._parts[name]
        if part.expert is None:
            return self._source.read(part.stored, index)
        (start, stop), columns = block_bounds(part.spec.shape, index)
        rows = slice(part.first_row + start, part.first_row + stop)
        return self._source.read(part.stored, (slice(part.expert, part.expert + 1), rows, slice(*columns)))[0]


def _parts(stored: str, spec: TensorSpec, names: tuple[str, ...]) -> Iterator[tuple[str, _Part]]:
    layer, gate, up, down = names
    if (router := _ROUTER.fullmatch(stored)) is not None:
        yield f"{router[1]}.{layer}.gate.weight", _Part(stored, spec)
        return
    if (fused := _FUSED.fullmatch(stored)) is None:
        yield stored, _Part(stored, spec)
        return
    kinds = (gate, up) if fused[2] == "gate_up_proj" else (down,)
    if len(spec.shape) != 3 or spec.shape[1] % len(kinds):
        raise CheckpointError(f"{stored} {list(spec.shape)} is not [experts, {'2 ' * (len(kinds) - 1)}rows, columns]")
    experts, rows, columns = spec.shape
    each = TensorSpec((rows // len(kinds), columns), spec.dtype)
    for e in range(experts):
        for place, kind in enumerate(kinds):
            yield f"{fused[1]}.{layer}.experts.{e}.{kind}.weight", _Part(stored, each, e, place * each.shape[0])
