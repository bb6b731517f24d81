"""Layers of experts that a file keeps in two fused tensors, read as one matrix for each expert.

transformers 5 keeps them fused in memory, and writes them in this form with `save_original_format=False`:
`mlp.experts.gate_up_proj` [E, 2 F, D], the gates before the ups (`up_proj` [E, F, D] without gates), and
`mlp.experts.down_proj` [E, D, F]. Some models are published so, or with both matrices transposed: [E, D, 2 F] and
[E, F, D].
"""

# E experts, F inner units of an expert, D model

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds
from jaxft.errors import CheckpointError, did_you_mean

# By family: the names of the layer and of an expert's gate, up and down, in files with one matrix for each expert.
SINGLE: dict[str, tuple[str, str, str, str]] = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    **dict.fromkeys(
        (
            "qwen3_moe",
            "qwen3_next",
            "qwen3_5_moe_text",
            "glm4_moe",
            "glm4_moe_lite",
            "deepseek_v2",
            "deepseek_v3",
            "ernie4_5_moe",
            "hunyuan_v1_moe",
        ),
        ("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    "nemotron_h": ("mixer", "", "up_proj", "down_proj"),
    "lfm2_moe": ("feed_forward", "w1", "w3", "w2"),
}
_LAYER = r"(model\.layers\.\d+)\.(?:mlp|mixer|feed_forward)"
_FUSED = re.compile(_LAYER + r"\.experts\.(gate_up_proj|up_proj|down_proj)")
_ROUTER = re.compile(_LAYER + r"\.gate\.weight")


@dataclass(frozen=True)
class _Part:
    """The place of a matrix in a tensor of the source: its expert and first row; the whole tensor if expert is None.

    transposed: whether the source has the matrix transposed, so that its rows are columns there.
    """

    source_name: str
    spec: TensorSpec
    expert: int | None = None
    first_row: int = 0
    transposed: bool = False


def is_fused(model_type: str, source: TensorSource) -> bool:
    """Whether a source keeps its experts fused."""
    return model_type in SINGLE and any(_FUSED.fullmatch(name) for name in source.specs())


class SingleExperts:
    """A source with one matrix for each expert, named as in `model_type`; other tensors stay as they are.

    Raises CheckpointError for a fused tensor of another form, and for a matrix that occurs twice.
    """

    def __init__(self, source: TensorSource, model_type: str) -> None:
        self._source = source
        self._parts: dict[str, _Part] = {}
        specs = source.specs()
        for source_name in specs:
            for name, part in _parts(source_name, specs, SINGLE[model_type]):
                if name in self._parts:
                    raise CheckpointError(f"{name} is in {self._parts[name].source_name} and in {source_name}")
                self._parts[name] = part

    def specs(self) -> dict[str, TensorSpec]:
        return {name: part.spec for name, part in self._parts.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if name not in self._parts:
            raise CheckpointError(f"no tensor {name!r}.{did_you_mean(name, self._parts)}")
        part = self._parts[name]
        if part.expert is None:
            return self._source.read(part.source_name, index)
        (start, stop), columns = block_bounds(part.spec.shape, index)
        rows = slice(part.first_row + start, part.first_row + stop)
        expert, cut = slice(part.expert, part.expert + 1), (rows, slice(*columns))
        matrix = self._source.read(part.source_name, (expert, *(cut[::-1] if part.transposed else cut)))[0]
        return matrix.T if part.transposed else matrix


def _parts(source_name: str, specs: Mapping[str, TensorSpec], names: tuple[str, ...]) -> Iterator[tuple[str, _Part]]:
    (layer, gate, up, down), spec = names, specs[source_name]
    if (router := _ROUTER.fullmatch(source_name)) is not None:
        yield f"{router[1]}.{layer}.gate.weight", _Part(source_name, spec)
        return
    if (fused := _FUSED.fullmatch(source_name)) is None:
        yield source_name, _Part(source_name, spec)
        return
    kinds = {"gate_up_proj": (gate, up), "up_proj": (up,), "down_proj": (down,)}[fused[2]]
    transposed = _is_transposed(fused[1], specs)
    shape = (spec.shape[0], *spec.shape[:0:-1]) if transposed else spec.shape
    if len(shape) != 3 or shape[1] % len(kinds):
        raise CheckpointError(
            f"{source_name} {list(spec.shape)} is not [experts, {'2 ' * (len(kinds) - 1)}rows, columns]"
        )
    experts, rows, columns = shape
    each = TensorSpec((rows // len(kinds), columns), spec.dtype)
    for e in range(experts):
        for position, kind in enumerate(kinds):
            part = _Part(source_name, each, e, position * each.shape[0], transposed)
            yield f"{fused[1]}.{layer}.experts.{e}.{kind}.weight", part


def _is_transposed(prefix: str, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether the experts of a layer are [E, D, 2 F] and [E, F, D]. The other form cannot have such shapes."""
    pair = [specs.get(f"{prefix}.mlp.experts.{name}") for name in ("gate_up_proj", "down_proj")]
    gate_up, down = (() if spec is None else spec.shape for spec in pair)
    return len(gate_up) == len(down) == 3 and gate_up[1:] == (down[2], 2 * down[1])
