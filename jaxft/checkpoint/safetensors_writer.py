"""Writing safetensors: one block of a tensor in memory at a time, files that appear whole or not at all.

Names of shards and the index are those of huggingface_hub, so that transformers and others load them.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from jaxft.checkpoint.finite import all_finite
from jaxft.checkpoint.tensors import DTYPES, TensorSpec, block_bounds
from jaxft.errors import ExportError, listed
from jaxft.files.atomic import unfinished_file, write_file, write_text

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK_BYTES = 2**28
Index = tuple[slice, ...]  # unit-step slices of leading axes, as in `TensorSource.read`
# A tensor's spec and the function that makes it: called without an argument for the whole, with an Index for a block.
LazyTensor = tuple[TensorSpec, Callable[..., np.ndarray]]


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to one file with at most BLOCK_BYTES of one of them in memory (or one row of its leading axis).

    tensors: name -> (spec, function that gives the array), called in the file's order: widest dtype first, so that
    every tensor is aligned, else in the given order. The file appears whole or not at all.
    Raises ExportError if an array does not match its spec.
    """
    raw, order, _ = _header(tensors, metadata)

    def fill(file: BinaryIO) -> None:
        file.write(raw)
        for name in order:
            for index in blocks(tensors[name][0]):
                # No variable holds the array, so that it is freed before the next is made.
                file.write(_bytes_of(name, *tensors[name], index))

    write_file(path, fill)


def is_finished(
    path: str | os.PathLike[str], tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
) -> bool:
    """Whether a file has the header and the size that writing these tensors would give it."""
    raw, _, data = _header(tensors, metadata)
    if not os.path.isfile(path) or os.path.getsize(path) != len(raw) + data:
        return False
    with open(path, "rb") as file:
        return file.read(len(raw)) == raw


def _header(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None) -> tuple[bytes, list[str], int]:
    """(everything before the data, names in the file's order, bytes of data)."""
    order = _file_order(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        spec, start = tensors[name][0], end
        if spec.dtype not in _NAMES:
            raise ExportError(f"tensor {name!r} has dtype {spec.dtype}, which safetensors does not have")
        end += spec.nbytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw, order, end


def _file_order(tensors: Mapping[str, LazyTensor]) -> list[str]:
    # The widest dtype first: then every tensor is aligned.
    return sorted(tensors, key=lambda name: -tensors[name][0].dtype.itemsize)


def blocks(spec: TensorSpec) -> Iterator[Index]:
    """The blocks of a tensor, each a run of its bytes: of at most BLOCK_BYTES, but at least one row.

    A tensor that is small enough is one block, ().
    """
    if spec.nbytes <= BLOCK_BYTES:
        yield ()
        return
    rows = spec.shape[0]
    step = max(1, BLOCK_BYTES * rows // spec.nbytes)
    for start in range(0, rows, step):
        yield (slice(start, min(start + step, rows)),)


def make_block(make: Callable[..., np.ndarray], index: Index) -> np.ndarray:
    """The block of a lazy tensor at an index from `blocks`."""
    return make(index) if index else make()


def _bytes_of(name: str, spec: TensorSpec, make: Callable[..., np.ndarray], index: Index) -> memoryview:
    array = make_block(make, index)
    shape = tuple(stop - start for start, stop in block_bounds(spec.shape, index))
    if array.shape != shape or array.dtype != spec.dtype:
        part = f"rows {index[0].start} to {index[0].stop} are" if index else "is"
        raise ExportError(f"tensor {name!r} was declared {spec}, but {part} {array.shape} {array.dtype}")
    if not all_finite(array):
        raise ExportError(
            f"tensor {name!r} has NaN or infinite values as {spec.dtype}, and is not written: the model has diverged, "
            "or its values are too large for that type. Export an earlier step, or use a wider type, such as float32."
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """The distribution of tensors over files. `index` is None if one file holds all."""

    files: dict[str, tuple[str, ...]]
    index: dict[str, Any] | None


def plan_shards(specs: Mapping[str, TensorSpec], max_bytes: int, stem: str = "model") -> ShardPlan:
    """Fills files of at most `max_bytes` of tensor data in the given order; a larger tensor gets a file of its own.

    stem: `model` gives model.safetensors, or model-00001-of-0000N.safetensors and their index.
    """
    if max_bytes < 1:
        raise ExportError(f"shards of at most {max_bytes} bytes cannot hold a tensor")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    if len(shards) == 1:
        return ShardPlan(files={f"{stem}.safetensors": tuple(shards[0])}, index=None)
    files = {f"{stem}-{i:05}-of-{len(shards):05}.safetensors": tuple(names) for i, names in enumerate(shards, 1)}
    metadata = {
        "total_parameters": sum(spec.size for spec in specs.values()),
        "total_size": sum(spec.nbytes for spec in specs.values()),
    }
    weight_map = {name: file for file, names in files.items() for name in names}
    return ShardPlan(files=files, index={"metadata": metadata, "weight_map": weight_map})


def write_sharded(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, LazyTensor],
    *,
    max_bytes: int,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
    keep_finished: bool = False,
) -> list[str]:
    """Writes tensors to `folder` in files of at most `max_bytes`, the index last; returns the file names.

    keep_finished: keep files of an interrupted call that already have the right header and size; the caller makes sure
    that they come from the same source.
    Raises ExportError if the folder already holds safetensors with this stem, which a loader could mix in.
    """
    folder = os.fspath(folder)
    plan = plan_shards({name: spec for name, (spec, _) in tensors.items()}, max_bytes, stem)
    index = f"{stem}.safetensors.index.json"
    own = set(plan.files)
    if keep_finished:
        own |= {index, *(str(unfinished_file(file)) for file in (*plan.files, index))}
    old = sorted(f for f in os.listdir(folder) if f.startswith(stem) and ".safetensors" in f and f not in own)
    if old:
        raise ExportError(f"{folder} already holds {listed(old, 3)}: remove them or write to an empty folder")
    for file, names in plan.files.items():
        chosen = {name: tensors[name] for name in names}
        # A file appears whole or not at all, so one with this header was finished by an interrupted call.
        if not (keep_finished and is_finished(os.path.join(folder, file), chosen, metadata)):
            write_safetensors(os.path.join(folder, file), chosen, metadata)
    if plan.index is None:
        return list(plan.files)
    write_text(os.path.join(folder, index), json.dumps(plan.index, indent=2) + "\n")
    return [*plan.files, index]


def gather_sharded(tensors: Mapping[str, LazyTensor], *, max_bytes: int = 2**62) -> list[str]:
    """Makes every block that `write_sharded` makes, without writing: for the processes other than 0.

    Arrays that span several processes are gathered by all of them, so the order is that of process 0.
    """
    plan = plan_shards({name: spec for name, (spec, _) in tensors.items()}, max_bytes)
    for names in plan.files.values():
        for name in _file_order({name: tensors[name] for name in names}):
            spec, make = tensors[name]
            for index in blocks(spec):
                make_block(make, index)
    return [*plan.files, *([] if plan.index is None else ["model.safetensors.index.json"])]
