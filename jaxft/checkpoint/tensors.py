"""Tensors on disk by name: what a source of them offers, and the safetensors of a folder.

A header is checked whole before any tensor is read, because what other loaders let through is a way
to read other files, or to load half a model without a word. Format:
https://github.com/huggingface/safetensors#format
"""

import itertools
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxft.errors import CheckpointError, did_you_mean

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and element type of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors, read on demand."""

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, without reading one."""
        ...

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or the block of it that `index` (unit-step slices of leading axes) cuts out.

        Only the bytes of the block are touched. Raises CheckpointError for an unknown name.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class _Stored:
    path: str
    offset: int  # bytes from the start of the file
    spec: TensorSpec


class SafetensorsFolder:
    """The safetensors of a Hugging Face folder: `filename`, or the shards of `filename`.index.json.

    path: the folder. filename: `model.safetensors`, or `adapter_model.safetensors` for PEFT.
    Raises CheckpointError, before any tensor is read, for files that are damaged, that lie outside
    the folder, that disagree with their index, or that are pickles. Source of the index's form:
    https://huggingface.co/docs/safetensors/index
    """

    def __init__(self, path: str | os.PathLike[str], filename: str = "model.safetensors"):
        self.path = os.fspath(path)
        files, weight_map = _files_of(self.path, filename)
        self._stored: dict[str, _Stored] = {}
        for file in files:
            for name, stored in _read_header(file).items():
                if name in self._stored:
                    raise CheckpointError(f"tensor {name!r} is in both {self._stored[name].path} and {file}")
                self._stored[name] = stored
        if weight_map is not None:
            _check_index(self.path, weight_map, self._stored)

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor in the folder."""
        return {name: stored.spec for name, stored in self._stored.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or a block of it, in fresh memory; see `TensorSource.read`.

        Reads rather than maps, so that what was read does not stay in this process's memory.
        """
        if name not in self._stored:
            raise CheckpointError(f"{self.path}: no tensor {name!r}.{did_you_mean(name, self._stored)}")
        stored = self._stored[name]
        bounds = block_bounds(stored.spec.shape, index)
        return _read_block(stored, bounds)


def block_bounds(shape: tuple[int, ...], index: tuple[slice, ...] | None) -> list[tuple[int, int]]:
    """(start, stop) along each axis of `shape` for an index of unit-step slices; absent ones take all."""
    index = index or ()
    if len(index) > len(shape):
        raise ValueError(f"{len(index)} slices for the {len(shape)} axes of shape {shape}")
    bounds = []
    for cut, length in itertools.zip_longest(index, shape, fillvalue=slice(None)):
        start, stop, step = cut.indices(length)
        if step != 1:
            raise ValueError(f"slice {cut} has step {step}; blocks are contiguous along each axis")
        bounds.append((start, max(start, stop)))
    return bounds


def pread(path: str, ranges: list[tuple[int, int]]) -> np.ndarray:
    """The bytes of (offset, length) ranges of a file, end to end, as uint8 in fresh memory."""
    out = np.empty(sum(length for _, length in ranges), np.uint8)
    view, done = memoryview(out), 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset, length in ranges:
            end = done + length
            while done < end:
                count = os.preadv(descriptor, [view[done:end]], offset)
                if count == 0:
                    raise CheckpointError(f"{path}: ends at byte {offset}; it was longer when it was opened")
                done, offset = done + count, offset + count
    finally:
        os.close(descriptor)
    return out


def _read_block(stored: _Stored, bounds: list[tuple[int, int]]) -> np.ndarray:
    shape, itemsize = stored.spec.shape, stored.spec.dtype.itemsize
    partial = [axis for axis, (start, stop) in enumerate(bounds) if (start, stop) != (0, shape[axis])]
    # From the last cut axis inwards the block is one run of bytes per position of the axes before it.
    last = partial[-1] if partial else 0
    strides = [itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    run = math.prod(stop - start for start, stop in bounds[last:]) * itemsize
    first = stored.offset + sum(start * stride for (start, _), stride in zip(bounds, strides, strict=True))
    outer = itertools.product(*(range(stop - start) for start, stop in bounds[:last]))
    ranges = [(first + sum(i * stride for i, stride in zip(at, strides, strict=False)), run) for at in outer]
    block_shape = tuple(stop - start for start, stop in bounds)
    return pread(stored.path, ranges).view(stored.spec.dtype).reshape(block_shape)


def _files_of(folder: str, filename: str) -> tuple[list[str], dict[str, str] | None]:
    """Checked paths of the safetensors of a folder, and the index's name -> file map if there is one."""
    if not os.path.isdir(folder):
        raise CheckpointError(f"no folder {folder!r}")
    entries, index = os.listdir(folder), f"{filename}.index.json"
    if filename in entries and index in entries:
        raise CheckpointError(f"{folder} holds both {filename} and {index}: remove the one that is stale")
    if filename in entries:
        return [_inside(folder, filename)], None
    if index in entries:
        weight_map = _read_index(_inside(folder, index))
        return [_inside(folder, file) for file in dict.fromkeys(weight_map.values())], weight_map
    pickles = sorted(entry for entry in entries if entry.endswith(_PICKLES))
    if pickles:
        raise CheckpointError(
            f"{folder} has no {filename}, only {', '.join(pickles[:3])}. jaxft never opens pickle files, which can run "
            "any code; convert with transformers, where you trust their author: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    shards = sorted(entry for entry in entries if entry.endswith(".safetensors"))
    found = f"only {', '.join(shards[:3])}" if shards else "no safetensors at all"
    raise CheckpointError(f"{folder} holds neither {filename} nor {index} ({found})")


def _inside(folder: str, name: str) -> str:
    """Real path of a file of the folder; links may lead elsewhere only within its Hugging Face cache entry."""
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: the index names {name!r}, which is not a file name in that folder")
    root = os.path.realpath(folder)
    snapshots = os.path.dirname(root)
    repository = os.path.dirname(snapshots)
    if os.path.basename(snapshots) == "snapshots" and os.path.basename(repository).startswith("models--"):
        root = repository
    path = os.path.realpath(os.path.join(folder, name))
    if os.path.commonpath([root, path]) != root:
        raise CheckpointError(f"{os.path.join(folder, name)} is a link to {path}, outside {root}")
    if not os.path.isfile(path):
        raise CheckpointError(f"{folder}: no file {name!r}, though its index or a link names it")
    return path


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name is there twice")
    return out


def _json_object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    return value


def _read_index(path: str) -> dict[str, str]:
    if os.path.getsize(path) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} has {os.path.getsize(path)} bytes; at most {MAX_HEADER_BYTES} are read")
    with open(path, "rb") as file:
        weight_map = _json_object(file.read(), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{path} has no 'weight_map' from tensor names to file names")
    return weight_map


def _check_index(folder: str, weight_map: Mapping[str, str], stored: Mapping[str, _Stored]) -> None:
    for name, file in weight_map.items():
        if name not in stored or stored[name].path != _inside(folder, file):
            raise CheckpointError(f"{folder}: the index places tensor {name!r} in {file}, which does not hold it")
    extra = sorted(set(stored) - set(weight_map))
    if extra:
        raise CheckpointError(f"{folder}: {len(extra)} tensors are not in the index, among them {extra[:3]}")


def _read_header(path: str) -> dict[str, _Stored]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(
                f"{path}: damaged or truncated: its header claims {length} bytes; the file has {size}, and a header "
                f"at most {MAX_HEADER_BYTES}"
            )
        header = _json_object(file.read(length), f"the header of {path}")
    header.pop("__metadata__", None)
    data = size - 8 - length
    spans = sorted((*_span(path, name, entry), name) for name, entry in header.items())
    end, previous = 0, "the header"
    for start, stop, name in spans:
        if start != end:
            what = "overlaps" if start < end else f"leaves a hole of {start - end} bytes after"
            raise CheckpointError(f"{path}: tensor {name!r} {what} {previous!r}")
        if stop > data:
            raise CheckpointError(
                f"{path}: damaged or truncated: tensor {name!r} ends at data byte {stop}, but the file has {data}"
            )
        end, previous = stop, name
    if end != data:
        raise CheckpointError(f"{path}: {data - end} bytes after the last tensor {previous!r} belong to none")
    offsets = {name: 8 + length + start for start, _, name in spans}
    return {name: _Stored(path=path, offset=offsets[name], spec=_spec(entry)) for name, entry in header.items()}


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(tuple(entry["shape"]), DTYPES[entry["dtype"]])


def _span(path: str, name: str, entry: Any) -> tuple[int, int]:
    """Checked data offsets of one header entry."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: the header of tensor {name!r} is not dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise CheckpointError(f"{path}: tensor {name!r} has {key} {numbers!r}, not a list of sizes")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {entry['dtype']!r}; known: {', '.join(DTYPES)}")
    nbytes = _spec(entry).nbytes
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} of {entry['dtype']} {shape} takes {nbytes} bytes, but data_offsets are {offsets}"
        )
    return offsets[0], offsets[1]
