"""The experts of gpt-oss: three matrices for each one in GGUF, two tensors a layer in Hugging Face's files.

Hugging Face keeps `gate_up_proj` [E, D, 2 F], a gate and an up in turn, and `down_proj` [E, F, D], inputs first; their
biases are `gate_up_proj_bias` [E, 2 F] and `down_proj_bias` [E, D]. The single matrices have the outputs first.
"""

# E experts, F inner units of an expert, D model

import itertools
import re
from collections.abc import Callable, Mapping

import numpy as np

from jaxft.checkpoint.safetensors_writer import LazyTensor, make_block
from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds

_FUSED = re.compile(r"(?P<layer>model\.layers\.\d+\.mlp\.experts)\.(?P<part>gate_up_proj|down_proj)(?P<bias>_bias)?")
_SINGLE = re.compile(
    r"(?P<layer>model\.layers\.\d+\.mlp\.experts)\.0\.(?P<part>gate_proj|down_proj)\.(?P<suffix>weight|bias)"
)
_SINKS = "self_attn.sinks"
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def single_experts(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors with one matrix for each expert, made from the block of that expert alone."""
    out: dict[str, LazyTensor] = {}
    for name, (spec, make) in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            out[f"{name}.weight" if name.endswith(_SINKS) else name] = (spec, make)
            continue
        suffix = "bias" if match["bias"] else "weight"
        parts = _PARTS[match["part"]]
        shape = (*spec.shape[1:-1], spec.shape[-1] // len(parts))[::-1]
        for e in range(spec.shape[0]):
            for first, part in enumerate(parts):
                key = f"{match['layer']}.{e}.{part}.{suffix}"
                out[key] = (TensorSpec(shape, spec.dtype), _expert(make, e, first, len(parts)))
    return out


def _expert(make: Callable[..., np.ndarray], e: int, first: int, step: int) -> Callable[..., np.ndarray]:
    """One expert's matrix, outputs first, or its bias: every `step`-th output from `first`."""

    def read() -> np.ndarray:
        return make_block(make, (slice(e, e + 1),))[0][..., first::step].T

    return read


class FusedExperts:
    """A source of single matrices under the names and shapes of Hugging Face's files of gpt-oss."""

    def __init__(self, source: TensorSource, experts: int) -> None:
        self._source, specs = source, source.specs()
        self._specs: dict[str, TensorSpec] = {}
        for name, spec in specs.items():
            match = _SINGLE.fullmatch(name)
            if name.endswith(f"{_SINKS}.weight"):
                self._specs[name.removesuffix(".weight")] = spec
            elif match is not None:
                fused, bias = match["part"] != "down_proj", match["suffix"] == "bias"
                part = ("gate_up_proj" if fused else "down_proj") + ("_bias" if bias else "")
                *inputs, outputs = spec.shape[::-1]
                shape = (experts, *inputs, outputs * (2 if fused else 1))
                self._specs[f"{match['layer']}.{part}"] = TensorSpec(shape, spec.dtype)
            elif ".mlp.experts." not in name:
                self._specs[name] = spec

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, without reading one."""
        return dict(self._specs)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """As `TensorSource.read`. Of every expert only what the block needs is read."""
        match = _FUSED.fullmatch(name)
        if match is None:
            return self._source.read(f"{name}.weight" if name.endswith(_SINKS) else name, index)
        spec = self._specs[name]
        (first, last), *inputs, (left, right) = block_bounds(spec.shape, index)
        parts, suffix = _PARTS[match["part"]], "bias" if match["bias"] else "weight"
        step = len(parts)
        start, stop = left // step, -(-right // step)
        out = np.empty((last - first, *(b - a for a, b in inputs), (stop - start) * step), spec.dtype)
        rows = (slice(start, stop), *(slice(*bounds) for bounds in inputs))
        for e, (offset, part) in itertools.product(range(first, last), enumerate(parts)):
            out[e - first, ..., offset::step] = self._source.read(f"{match['layer']}.{e}.{part}.{suffix}", rows).T
        return out[..., left - start * step : right - start * step]
