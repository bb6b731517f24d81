"""GGUF files as a source of tensors under Hugging Face names, with the equivalent config.json.

The `gguf` library dequantises weights to float32 as they are read. Names, the order of rows and the 1 in Gemma's norms
are those of llama.cpp's converter, undone here.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Container
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from jaxft import models
from jaxft.checkpoint.gguf.config import prediction_layers, read_config, read_family
from jaxft.checkpoint.gguf.family import Family
from jaxft.checkpoint.gguf.kinds import FileKinds, file_kinds
from jaxft.checkpoint.gguf.layout.arrangement import file_tensors, joined_tensors, single_shapes
from jaxft.checkpoint.gguf.layout.values import from_file, is_by_rows
from jaxft.checkpoint.gguf.names import (
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    gguf_modules,
    heads_interleaved,
)
from jaxft.checkpoint.prediction import left_out_note, unused_note
from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds
from jaxft.errors import CheckpointError, ModelError, did_you_mean, listed
from jaxft.files.gguf.header import GGUFHeader, GGUFTensor, read_header
from jaxft.files.paths import pread
from jaxft.models.family import FamilyConfig


class GGUFFile:
    """Tensors of a GGUF file under Hugging Face names and shapes, float32, dequantised on demand; experts single.

    Raises, before any weight is read, CheckpointError for a damaged or incomplete file, and ModelError naming an
    architecture, a tensor, a tensor type or a setting that is not understood.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.header = read_header(path)
        self.path = self.header.path
        self.family = read_family(self.header)
        _check_types(self.header)
        self._hf_config = read_config(self.header, self.family, _rope_vectors(self.header))
        self._config = models.config_from_hf(self._hf_config)
        self._shapes = single_shapes(self.family, self._config)
        self._left_out = _prediction_tensors(self.header, self.family, self._config)
        self._unused = _unused_tensors(self.header, self.family, self._config)
        self._tensors = _named_tensors(self.header, self.family, self._config, {*self._left_out, *self._unused})

    def kinds(self, dtype: str) -> FileKinds:
        """The types of the tensors of a file of this model that is written as `dtype`."""
        return file_kinds(dtype, self.family, self._config)

    def tensors(self) -> TensorSource:
        """The tensors under the names and shapes of Hugging Face's files, some of which keep experts fused."""
        return joined_tensors(self.family, self._config, self.header, self)

    def notes(self) -> tuple[str, ...]:
        """Sentences on what the file has and the tensors here lack."""
        return tuple(
            note(len(tensors), sum(math.prod(tensor.shape) for tensor in tensors.values()))
            for note, tensors in ((left_out_note, self._left_out), (unused_note, self._unused))
            if tensors
        )

    def hf_config(self) -> dict[str, Any]:
        """config.json of the equivalent Hugging Face folder."""
        return dict(self._hf_config)

    def generation_config(self) -> dict[str, Any] | None:
        """generation_config.json with every token that ends an answer by the file; None if it names none."""
        stops = sorted(self.header.stop_ids())
        return {"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else None

    def specs(self) -> dict[str, TensorSpec]:
        """Hugging Face's shapes ([out, in] for weights); every tensor is read as float32."""
        return {name: TensorSpec(self._shapes[name], np.dtype(np.float32)) for name in self._tensors}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or a block of it, float32; see `TensorSource.read`. Whole rows are read, then sliced."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: no tensor {name!r}.{did_you_mean(name, self._tensors)}")
        tensor, shape = self._tensors[name], self._shapes[name]
        bounds = block_bounds(shape, index)
        if not is_by_rows(self.family, self._config, name, shape):
            whole = from_file(self.family, self._config, name, _rows(tensor, 0, math.prod(tensor.shape[:-1])), shape)
            return whole[tuple(slice(*cut) for cut in bounds)]
        start, stop = bounds[0]
        order = self._row_order(name, start, stop)
        if order is None or start == stop:
            rows = _rows(tensor, start, stop)
        else:
            low = int(order.min())
            rows = _rows(tensor, low, int(order.max()) + 1)[order - low]
        return rows[:, slice(*bounds[1])]

    def _row_order(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """The file's rows that are Hugging Face's rows start:stop; None if they are the same."""
        if not heads_interleaved(self.family, name.rpartition(".")[0], self._config):
            return None
        head_dim = self._config.head_dim
        head, within = np.divmod(np.arange(start, stop), head_dim)
        half, pair = np.divmod(within, head_dim // 2)
        return head * head_dim + 2 * pair + half


def _rows(tensor: GGUFTensor, start: int, stop: int) -> np.ndarray:
    """Rows start:stop as float32 [stop - start, innermost]."""
    if start == stop:
        return np.empty((0, tensor.shape[-1]), np.float32)
    raw = pread(tensor.file, [(tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes)])
    return dequantize(raw.reshape(stop - start, tensor.row_bytes), tensor.type)


def _rope_vectors(header: GGUFHeader) -> dict[str, np.ndarray]:
    """The rotary factors, which are settings rather than weights."""
    names = [name for name in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS) if name in header.tensors]
    return {name: _rows(header.tensors[name], 0, 1)[0] for name in names}


def _prediction_tensors(header: GGUFHeader, family: Family, config: FamilyConfig) -> dict[str, GGUFTensor]:
    """The tensors of layers that predict several tokens at once, which are the file's last layers."""
    first = config.num_hidden_layers
    number = prediction_layers(header, family, header.metadata[f"{family.arch}.block_count"])
    starts = tuple(f"blk.{layer}." for layer in range(first, first + number))
    return {name: tensor for name, tensor in header.tensors.items() if name.startswith(starts)}


def _unused_tensors(header: GGUFHeader, family: Family, config: FamilyConfig) -> dict[str, GGUFTensor]:
    """The tensors for keys and values of layers that use those of another layer."""
    modules = gguf_modules(family, config.num_hidden_layers)
    unused = {f"{module.name}.weight" for name, module in modules.items() if config.is_unused(f"{name}.weight")}
    return {name: tensor for name, tensor in header.tensors.items() if name in unused}


def _named_tensors(
    header: GGUFHeader, family: Family, config: FamilyConfig, left_out: Container[str]
) -> dict[str, GGUFTensor]:
    """Tensors by Hugging Face name, each expert on its own; refuses unknown, missing and misshapen ones."""
    expected = file_tensors(family, config)
    named: dict[str, GGUFTensor] = {}
    for name, tensor in header.tensors.items():
        if name in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS) or (name in left_out and name not in expected):
            continue
        if name not in expected:
            raise ModelError(
                f"{header.path}: tensor {name!r} has no place in a {family.model_type} model of "
                f"{config.num_hidden_layers} layers.{did_you_mean(name, expected)}"
            )
        wanted = expected[name]
        if _without_ones(tensor.shape) != _without_ones(wanted.shape):
            raise CheckpointError(f"{header.path}: tensor {name!r} has shape {tensor.shape}, not {wanted.shape}")
        named |= {hf: _expert(tensor, e) if wanted.merged else tensor for e, hf in enumerate(wanted.members)}
    missing = [name for name in expected if name not in header.tensors]
    if missing:
        raise CheckpointError(f"{header.path}: {len(missing)} tensors are missing: {listed(missing, 3)}")
    return named


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading ones, which some files have."""
    return tuple(itertools.dropwhile(lambda size: size == 1, shape))


def _expert(merged: GGUFTensor, e: int) -> GGUFTensor:
    """The matrix or the bias of one expert in a tensor that holds those of all experts."""
    shape = merged.shape[1:]
    rows = math.prod(shape[:-1])
    return dataclasses.replace(merged, shape=shape, offset=merged.offset + e * rows * merged.row_bytes)


def _check_types(header: GGUFHeader) -> None:
    for kind, name in {tensor.type: tensor.name for tensor in header.tensors.values()}.items():
        _, block_bytes = GGML_QUANT_SIZES[kind]
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError as error:
            raise ModelError(
                f"{header.path}: tensor {name!r} has the type {kind.name}, which the gguf library does not dequantise"
            ) from error
