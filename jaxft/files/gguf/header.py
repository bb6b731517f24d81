"""The header of a GGUF file: metadata and the location of each tensor, checked before any weight is read.

The `gguf` library supplies the type tables and the dequantisation. Its reader is not used. It takes bytes beyond the
end of a short file for empty values, and it builds several arrays for each vocabulary entry: 49,152 tokens take 3 s,
here 0.1 s. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from jaxft.errors import CheckpointError, did_you_mean, listed
from jaxft.files.gguf.kinds import check_metadata
from jaxft.files.gguf.parts import is_part, part_names
from jaxft.files.paths import check_link

MAX_HEADER_BYTES = 2**28  # vocabularies of 262,144 tokens take about 10 MB
_DEFAULT_ALIGNMENT = 32
MAX_PARTS = 65_535  # split.count has 16 bits

_SCALARS: dict[int, str] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """A tensor and its location. `shape`: outermost dimension first, the reverse of the file's order. `file`: its path.

    A model may be split into several files.
    """

    file: str
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    row_bytes: int  # the bytes of one row along the innermost dimension

    @property
    def nbytes(self) -> int:
        return self.row_bytes * math.prod(self.shape[:-1])


CONTROL = 3  # a value of tokenizer.ggml.token_type
# Tokens at which llama.cpp ends a generation because of their spelling, whatever the keys of the file say.
ENDS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> <|end_of_text|> <|eom_id|> <EOT> "
    "_<EOT> <end_of_utterance>".split()
)
HARMONY_ENDS = {"<|return|>", "<|call|>"}


@dataclass(frozen=True, kw_only=True)
class GGUFHeader:
    """All that precedes the weights. Metadata arrays are numpy arrays, or lists of str.

    path: of the file, or of the first part of a model that is split into several.
    """

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def require(self, key: str) -> Any:
        """The metadata value of `key`. Raises CheckpointError if it is absent."""
        if key not in self.metadata:
            raise CheckpointError(f"{self.path}: no metadata {key!r}.{did_you_mean(key, self.metadata)}")
        return self.metadata[key]

    def stop_ids(self) -> frozenset[int]:
        """Ids of the tokens that end an answer: of a text (eos), a turn (eot) or a message (eom).

        Control tokens that llama.cpp knows by their spelling are among them, because files leave them out of the keys.
        """
        keys = (f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
        named = {self.metadata[key] for key in keys if self.metadata.get(key) is not None}
        tokens = self.metadata.get("tokenizer.ggml.tokens", [])
        types = self.metadata.get("tokenizer.ggml.token_type", [])
        control = (i for i, kind in enumerate(types) if kind == CONTROL and i < len(tokens))
        spelt = {tokens[i]: i for i in control if tokens[i] in ENDS}
        if HARMONY_ENDS <= spelt.keys():
            spelt.pop("<|end|>", None)  # there it ends a message, after which the answer goes on
        return frozenset(named | set(spelt.values()))


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """The header of the GGUF file at `path`, little-endian, version 2 or 3; of all files if it is a part of a model.

    Raises CheckpointError for a file that is not GGUF, is truncated, names a tensor twice, or has tensors that overlap
    or end beyond the file; and for a part whose siblings are missing or do not belong to it.
    """
    path = os.fspath(path)
    header = _read_one(path)
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or not 1 <= count <= MAX_PARTS:
        raise CheckpointError(f"{path}: split.count is {count!r}, not a number of parts from 1 to {MAX_PARTS}")
    return header if count == 1 else _join(part_files(path, count), path, header)


def part_files(path: str, count: int | None = None) -> list[str]:
    """The files of a model that is split into several, in order, given any of them; the file alone if it is whole.

    count: their number by the header. Raises CheckpointError if the name of a part has another form, or files are
    missing.
    """
    if not is_part(path):
        if count is None:
            return [path]
        raise CheckpointError(
            f"{path} is a part of a model of {count} files, but its name does not end in -NNNNN-of-{count:05d}.gguf, "
            "so that the others cannot be told. Give all of them the names that they had."
        )
    files = part_names(path)
    total = len(files)
    if count is not None and total != count:
        raise CheckpointError(f"{path} is a part of a model of {count} files by its header, but of {total} by its name")
    missing = [os.path.basename(file) for file in files if not os.path.isfile(file)]
    if missing:
        raise CheckpointError(
            f"{path} is a part of a model of {total} files, and {len(missing)} of them are missing: {listed(missing)}. "
            "Put all of them into one folder."
        )
    if total > 1:
        for file in files:
            check_link(file, os.path.dirname(path) or ".")
    return files


def _join(files: Sequence[str], path: str, given: GGUFHeader) -> GGUFHeader:
    """One header of all parts: the metadata of the first, the tensors of all. given: the header of `path`."""
    headers = [given if file == path else _read_one(file) for file in files]
    tensors: dict[str, GGUFTensor] = {}
    for index, header in enumerate(headers):
        own = {key: header.metadata.get(f"split.{key}") for key in ("no", "count")}
        if own != {"no": index, "count": len(files)}:
            raise CheckpointError(
                f"{header.path} should be part {index} of {len(files)}, counted from 0, but its header says part "
                f"{own['no']} of {own['count']}: it belongs to another model, or was renamed"
            )
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"tensor {name!r} is in {tensors[name].file} and in {header.path}")
            tensors[name] = tensor
    expected = headers[0].metadata.get("split.tensors.count")
    if expected is not None and expected != len(tensors):
        raise CheckpointError(
            f"{files[0]}: the {len(files)} parts have {len(tensors)} tensors, but there should be {expected}: they are "
            "parts of different models"
        )
    return GGUFHeader(path=headers[0].path, metadata=headers[0].metadata, tensors=tensors)


def _read_one(path: str) -> GGUFHeader:
    if not os.path.isfile(path):
        raise CheckpointError(f"no GGUF file at {path!r}")
    with open(path, "rb") as file:
        return _Parser(file, path).header()


class _Parser:
    def __init__(self, file: BinaryIO, path: str):
        self.file, self.path = file, path
        self.file_bytes = os.fstat(file.fileno()).st_size
        self.limit = min(self.file_bytes, MAX_HEADER_BYTES)
        self.position = 0

    def header(self) -> GGUFHeader:
        if self.file_bytes < 24 or self.take(4) != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file (it does not start with 'GGUF')")
        version = self.number("<I")
        if version not in (2, 3):
            big_endian = "; it looks big-endian" if version & 0xFFFF == 0 else ""
            raise CheckpointError(f"{self.path}: GGUF version {version}; versions 2 and 3 are read{big_endian}")
        tensor_count, metadata_count = self.number("<Q"), self.number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = self.text()
            if key in metadata:
                raise CheckpointError(f"{self.path}: metadata {key!r} is there twice")
            metadata[key] = self.value(self.number("<I"), key)
        check_metadata(metadata, self.path)
        infos = [self.tensor_info() for _ in range(tensor_count)]
        return GGUFHeader(path=self.path, metadata=metadata, tensors=self.locate(infos, metadata))

    def take(self, count: int) -> bytes:
        if self.position + count > self.limit:
            why = "the file ends first" if self.limit == self.file_bytes else f"a header ends within {self.limit} bytes"
            raise CheckpointError(
                f"{self.path}: damaged or truncated: its header wants {count} bytes at byte {self.position}, but {why}"
            )
        self.position += count
        return self.file.read(count)

    def number(self, kind: str) -> int:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        start, raw = self.position, self.take(self.number("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: the text at byte {start} is not UTF-8: {error}") from error

    def value(self, kind: int, key: str) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            number = self.numbers(kind, 1, key)[0]
            return bool(number) if kind == GGUFValueType.BOOL else number.item()
        kind, count = self.number("<I"), self.number("<Q")
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        return self.numbers(kind, count, key)

    def numbers(self, kind: int, count: int, key: str) -> np.ndarray:
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: metadata {key!r} has the value type {kind}, which jaxft does not read")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def tensor_info(self) -> GGUFTensor:
        name, rank = self.text(), self.number("<I")
        if not 1 <= rank <= 4:
            raise CheckpointError(f"{self.path}: tensor {name!r} has {rank} dimensions; GGUF has 1 to 4")
        shape = tuple(self.number("<Q") for _ in range(rank))[::-1]
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in GGML_QUANT_SIZES:
            raise CheckpointError(f"{self.path}: tensor {name!r} has the unknown type number {kind}")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if 0 in shape or shape[-1] % block:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {shape} does not fit its type "
                f"{GGMLQuantizationType(kind).name}, which stores rows in blocks of {block}"
            )
        row_bytes = shape[-1] // block * block_bytes
        return GGUFTensor(
            file=self.path,
            name=name,
            shape=shape,
            type=GGMLQuantizationType(kind),
            offset=offset,
            row_bytes=row_bytes,
        )

    def locate(self, infos: Iterable[GGUFTensor], metadata: dict[str, Any]) -> dict[str, GGUFTensor]:
        """Tensors by name, with offsets from the start of the file. Refuses overlaps and an end beyond the file."""
        align = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise CheckpointError(f"{self.path}: general.alignment is {align!r}, not a power of two")
        start = -(-self.position // align) * align
        tensors: dict[str, GGUFTensor] = {}
        end, previous = start, "the header"
        for info in sorted(infos, key=lambda info: info.offset):
            tensor = replace(info, offset=start + info.offset)
            if tensor.name in tensors:
                raise CheckpointError(f"{self.path}: tensor {tensor.name!r} is there twice")
            if tensor.offset < end:
                raise CheckpointError(f"{self.path}: tensor {tensor.name!r} overlaps {previous!r}")
            end, previous = tensor.offset + tensor.nbytes, tensor.name
            if end > self.file_bytes:
                raise CheckpointError(
                    f"{self.path}: truncated: tensor {tensor.name!r} ends at byte {end}, but the file has "
                    f"{self.file_bytes} bytes. Download it again."
                )
            tensors[tensor.name] = tensor
        return tensors
