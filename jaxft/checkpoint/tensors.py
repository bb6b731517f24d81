"""Named tensors on disk: the protocol of a source of them, and the safetensors of a folder.

A whole header is checked before any tensor is read. Headers that other loaders accept can read other files, or load
half a model without an error. Format: https://github.com/huggingface/safetensors#format
"""

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxft.errors import CheckpointError, did_you_mean, listed
from jaxft.files.paths import Folder, folder_json, json_object, open_folder

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
        """The tensor, or the block of it that `index` (unit-step slices of leading axes) selects, in fresh memory.

        Only the bytes of the block are read. Raises CheckpointError for an unknown name.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """Where a tensor is in the files of a folder."""

    file: str
    offset: int  # bytes from the start of the file
    spec: TensorSpec


class SafetensorsFolder:
    """The safetensors of a Hugging Face folder: `filename`, or the shards of `filename`.index.json.

    path: the folder, or an address such as gs://bucket/model. filename: `model.safetensors`, or
    `adapter_model.safetensors` for PEFT.
    Raises CheckpointError, before any tensor is read, for files that are damaged, outside the folder, pickles, or
    different from their index. Source of the index's form: https://huggingface.co/docs/safetensors/index
    """

    def __init__(self, path: str | os.PathLike[str], filename: str = "model.safetensors"):
        self._folder, self.path = open_folder(path), os.fspath(path)
        self.files, weight_map = _files_of(self._folder, filename)
        self._tensors: dict[str, FileTensor] = {}
        for file in self.files:
            for name, tensor in _read_header(self._folder, file).items():
                if name in self._tensors:
                    raise CheckpointError(f"{self.path}: {name!r} is in both {self._tensors[name].file} and {file}")
                self._tensors[name] = tensor
        if weight_map is not None:
            _check_index(self.path, weight_map, self._tensors)

    def specs(self) -> dict[str, TensorSpec]:
        return {name: tensor.spec for name, tensor in self._tensors.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: no tensor {name!r}.{did_you_mean(name, self._tensors)}")
        tensor = self._tensors[name]
        return _read_block(self._folder, tensor, block_bounds(tensor.spec.shape, index))


def block_bounds(shape: tuple[int, ...], index: tuple[slice, ...] | None) -> list[tuple[int, int]]:
    """(start, stop) along each axis of `shape` for an index of unit-step slices; absent ones take all."""
    index = index or ()
    if len(index) > len(shape):
        raise ValueError(f"{len(index)} slices for the {len(shape)} axes of shape {shape}")
    bounds = []
    for cut, length in zip((*index, *(slice(None),) * (len(shape) - len(index))), shape, strict=True):
        start, stop, step = cut.indices(length)
        if step != 1:
            raise ValueError(f"slice {cut} has step {step}; blocks are contiguous along each axis")
        bounds.append((start, max(start, stop)))
    return bounds


def _read_block(folder: Folder, tensor: FileTensor, bounds: list[tuple[int, int]]) -> np.ndarray:
    shape, itemsize = tensor.spec.shape, tensor.spec.dtype.itemsize
    partial = [axis for axis, (start, stop) in enumerate(bounds) if (start, stop) != (0, shape[axis])]
    # From the last cut axis inwards the block is one run of bytes per position of the axes before it.
    last = partial[-1] if partial else 0
    strides = [itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    run = math.prod(stop - start for start, stop in bounds[last:]) * itemsize
    first = tensor.offset + sum(start * stride for (start, _), stride in zip(bounds, strides, strict=True))
    outer = itertools.product(*(range(stop - start) for start, stop in bounds[:last]))
    ranges = [(first + sum(i * stride for i, stride in zip(at, strides, strict=False)), run) for at in outer]
    block_shape = tuple(stop - start for start, stop in bounds)
    return folder.read(tensor.file, ranges).view(tensor.spec.dtype).reshape(block_shape)


def _files_of(folder: Folder, filename: str) -> tuple[list[str], dict[str, str] | None]:
    """The safetensors of a folder, and the index's name -> file map if there is one."""
    entries, index = folder.names(), f"{filename}.index.json"
    if filename in entries and index in entries:
        raise CheckpointError(f"{folder.path} holds both {filename} and {index}: remove the one that is stale")
    if filename in entries:
        return [filename], None
    if index in entries:
        weight_map = _read_index(folder, index)
        return list(dict.fromkeys(weight_map.values())), weight_map
    pickles = sorted(entry for entry in entries if entry.endswith(_PICKLES))
    if pickles:
        raise CheckpointError(
            f"{folder.path} has no {filename}, only {listed(pickles, 3)}. jaxft never opens pickle files, which "
            "can run any code; convert with transformers, if you trust their author: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    shards = sorted(entry for entry in entries if entry.endswith(".safetensors"))
    present = f"only {listed(shards, 3)}" if shards else "no safetensors at all"
    raise CheckpointError(f"{folder.path} holds neither {filename} nor {index} ({present})")


def _read_index(folder: Folder, name: str) -> dict[str, str]:
    weight_map = folder_json(folder, name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{folder.path}/{name} has no 'weight_map' from tensor names to file names")
    return weight_map


def _check_index(folder: str, weight_map: Mapping[str, str], tensors: Mapping[str, FileTensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(f"{folder}: the index places tensor {name!r} in {file}, which does not hold it")
    extra = sorted(set(tensors) - set(weight_map))
    if extra:
        raise CheckpointError(f"{folder}: {len(extra)} tensors are not in the index: {listed(extra, 3)}")


def _read_header(folder: Folder, file: str) -> dict[str, FileTensor]:
    size, path = folder.size(file), f"{folder.path}/{file}"
    length = int(folder.read(file, [(0, 8)]).view("<u8")[0]) if size >= 8 else size
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointError(
            f"{path}: damaged or truncated: its header claims {length} bytes; the file has {size}, and a header "
            f"at most {MAX_HEADER_BYTES}"
        )
    header = json_object(folder.read(file, [(8, length)]).tobytes(), f"the header of {path}")
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
    return {name: FileTensor(file=file, offset=offsets[name], spec=_spec(entry)) for name, entry in header.items()}


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
