"""Tensors that hold several matrices in Hugging Face's files and are single ones in GGUF.

Some families keep all experts of a layer in one tensor, or gates and ups; their order of axes and of rows differs.
"""

# E experts, F inner units of an expert, D model

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jaxft.checkpoint.safetensors_writer import LazyTensor, make_block
from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds

_LAYER = re.compile(r"(model\.layers\.\d{1,9}\.)(.+)")
GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A tensor of a layer in Hugging Face's files, and the single ones that it consists of.

    name, bias: of it and of its biases, None for none. single: the module of a single one, where `{e}` is the number of
    an expert, if it holds experts, and `{part}` one of `parts`. alternate: whether its outputs belong to the parts in
    turn, instead of half to each. outputs_first: whether outputs are before inputs, as in the single ones.
    """

    name: str
    single: str
    parts: tuple[str, ...]
    bias: str | None = None
    alternate: bool = False
    outputs_first: bool = True

    @property
    def has_experts(self) -> bool:
        return "{e}" in self.single


def fused_experts(
    gate_up: str, down: str, single: str, *, biases: bool = False, alternate: bool = False, outputs_first: bool = True
) -> tuple[Fused, ...]:
    """The two tensors of a layer's experts. single: as in `Fused`. biases: whether each of the two has biases."""
    return tuple(
        Fused(
            name=name,
            single=single,
            parts=parts,
            bias=f"{name}_bias" if biases else None,
            alternate=alternate,
            outputs_first=outputs_first,
        )
        for name, parts in ((gate_up, GATE_UP), (down, DOWN))
    )


def _find(name: str, fused: tuple[Fused, ...]) -> tuple[str, Fused, str] | None:
    """(the layer's prefix, the entry, the ending of single names) of a Hugging Face tensor that is fused."""
    match = _LAYER.fullmatch(name)
    for entry in fused if match is not None else ():
        if match is not None and match[2] in (entry.name, entry.bias):
            return match[1], entry, "weight" if match[2] == entry.name else "bias"
    return None


def split_tensors(tensors: Mapping[str, LazyTensor], fused: tuple[Fused, ...]) -> dict[str, LazyTensor]:
    """The tensors with one for each single matrix, made from its own block alone."""
    out: dict[str, LazyTensor] = {}
    for name, (spec, make) in tensors.items():
        located = _find(name, fused)
        if located is None:
            out[name] = (spec, make)
            continue
        layer, entry, ending = located
        shape = spec.shape[1:] if entry.has_experts else spec.shape
        outputs = shape[0] if entry.outputs_first or len(shape) == 1 else shape[-1]
        inputs = shape[1:] if entry.outputs_first else shape[:-1]
        size = outputs // len(entry.parts)
        for e, (n, part) in itertools.product(_experts(spec.shape, entry), enumerate(entry.parts)):
            single = f"{layer}{entry.single.format(e=e, part=part)}.{ending}"
            out[single] = (TensorSpec((size, *inputs), spec.dtype), _one(make, entry, e, n, size))
    return out


def _experts(shape: tuple[int, ...], entry: Fused) -> range:
    return range(shape[0] if entry.has_experts else 1)


def _one(make: Callable[..., np.ndarray], entry: Fused, e: int, n: int, size: int) -> Callable[..., np.ndarray]:
    """A single matrix, outputs first, or its bias: the n-th of the parts of expert e."""

    def read() -> np.ndarray:
        whole = make_block(make, (slice(e, e + 1),))[0] if entry.has_experts else make()
        rows = whole if entry.outputs_first or whole.ndim == 1 else whole.T
        return rows[n :: len(entry.parts)] if entry.alternate else rows[n * size : (n + 1) * size]

    return read


class JoinedTensors:
    """A source of single matrices under the names and shapes of Hugging Face's files."""

    def __init__(self, source: TensorSource, names: Mapping[str, TensorSpec], fused: tuple[Fused, ...]) -> None:
        """names: the specs of all tensors under Hugging Face's names."""
        self._source, self._fused = source, fused
        self._specs = dict(names)

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, without reading one."""
        return dict(self._specs)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """As `TensorSource.read`. Of every single matrix only what the block needs is read."""
        located = _find(name, self._fused)
        if located is None:
            return self._source.read(name, index)
        layer, entry, ending = located
        spec = self._specs[name]
        bounds = block_bounds(spec.shape, index)
        first, last = bounds[0] if entry.has_experts else (0, 1)
        inner, shape = (bounds[1:], spec.shape[1:]) if entry.has_experts else (bounds, spec.shape)
        inputs_last = entry.outputs_first or len(inner) == 1
        (left, right), *inputs = inner if inputs_last else inner[::-1]
        size = (shape[0] if inputs_last else shape[-1]) // len(entry.parts)
        out = np.empty((last - first, right - left, *(b - a for a, b in inputs)), spec.dtype)
        columns = tuple(slice(*cut) for cut in inputs)
        for e in range(first, last):
            for part, rows, within in _rows(entry, size, left, right):
                single = f"{layer}{entry.single.format(e=e, part=part)}.{ending}"
                out[e - first, within] = self._source.read(single, (rows, *columns))
        out = out if inputs_last else np.ascontiguousarray(out.swapaxes(1, 2))
        return out if entry.has_experts else out[0]


def _rows(entry: Fused, size: int, left: int, right: int) -> Iterator[tuple[str, slice, slice]]:
    """(part, its outputs, where they are in the block) of the outputs left:right of a fused tensor."""
    step = len(entry.parts)
    for n, part in enumerate(entry.parts):
        if entry.alternate:
            start, stop = -((n - left) // step), -((n - right) // step)
            within = slice(start * step + n - left, None, step)
        else:
            start, stop = (min(max(end - n * size, 0), size) for end in (left, right))
            within = slice(start + n * size - left, stop + n * size - left)
        if start < stop:
            yield part, slice(start, stop), within
