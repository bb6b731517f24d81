"""Tensors of Gemma 3n: projections of the streams, which a file has in one tensor, and the table of layers' inputs.

A file has a row of that table for every token. Hugging Face's has none for tokens of images and sound, which take the
first row: so these rows are copies of it. llama.cpp loads keys and values for all layers and uses those of the first
ones; those of the others are zeros.
"""

# A streams, D model, V tokens, R rows of the table

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxft.checkpoint.safetensors_writer import LazyTensor
from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds
from jaxft.models.families.gemma.gemma3n import Config
from jaxft.nn.residual.altup import PROJECTIONS, UNEMBED

_ONE = re.compile(rf"(model\.(?:{PROJECTIONS}|{UNEMBED}))\.(\d)\.weight")
_TABLE = "model.embed_tokens_per_layer.weight"


def split_streams(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The tensors with one [A - 1, D, D] in place of single projections, and the table with a row for every token."""
    out: dict[str, LazyTensor] = {}
    stacks: dict[str, list[LazyTensor]] = {}
    for name, (spec, make) in tensors.items():
        if (match := _ONE.fullmatch(name)) is not None:
            stacks.setdefault(f"{match[1]}.weight", []).append((spec, make))
        elif name == _TABLE and spec.shape[0] < config.vocab_size:
            filled = TensorSpec((config.vocab_size, spec.shape[1]), spec.dtype)
            out[name] = (filled, functools.partial(_filled, make, config.vocab_size))
        else:
            out[name] = (spec, make)
    for name, parts in stacks.items():
        stacked = TensorSpec((len(parts), *parts[0][0].shape), parts[0][0].dtype)
        out[name] = (stacked, functools.partial(_stacked, [make for _, make in parts]))
    for name, shape in _spare_shapes(config).items():
        spare = TensorSpec(shape, np.dtype(np.float32))
        out.setdefault(name, (spare, functools.partial(_zeros, shape)))
    return out


def _spare_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The tensors for keys and values of the layers without, by their names."""
    width = config.num_key_value_heads * config.head_dim
    parts = {"k_proj": (width, config.hidden_size), "v_proj": (width, config.hidden_size), "k_norm": (config.head_dim,)}
    first = config.num_hidden_layers - config.num_kv_shared_layers
    return {
        f"model.layers.{layer}.self_attn.{part}.weight": shape
        for layer in range(first, config.num_hidden_layers)
        for part, shape in parts.items()
    }


def _zeros(shape: tuple[int, ...], index: Any = None) -> np.ndarray:
    zeros = np.zeros(shape, np.float32)
    return zeros if index is None else zeros[index]


def _filled(make: Callable[..., np.ndarray], rows: int, index: Any = None) -> np.ndarray:
    table_RX = make()
    filled = np.concatenate([table_RX, np.repeat(table_RX[:1], rows - len(table_RX), axis=0)])
    return filled if index is None else filled[index]


def _stacked(makers: list[Callable[..., np.ndarray]], index: Any = None) -> np.ndarray:
    stacked = np.stack([make() for make in makers])
    return stacked if index is None else stacked[index]


class SingleProjections:
    """A source of the single projections."""

    def __init__(self, source: TensorSource, names: Mapping[str, TensorSpec]) -> None:
        self._source, self._specs = source, dict(names)

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, without reading one."""
        return dict(self._specs)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """As `TensorSource.read`. Of a projection all are read."""
        match = _ONE.fullmatch(name)
        if match is None:
            return self._source.read(name, index)
        matrix = self._source.read(f"{match[1]}.weight")[int(match[2])]
        return matrix[tuple(slice(*cut) for cut in block_bounds(matrix.shape, index))]
