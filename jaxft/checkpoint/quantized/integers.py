"""Matrices in 4-bit whole numbers by GPTQ, AWQ and compressed-tensors, which differ in how they pack the codes.

Each is (code - zero) * scale, with a zero and a scale for each group of inputs of an output.
Sources: `TorchLinear` of gptqmodel, `packing_utils` of AutoAWQ, `PackedQuantizationCompressor` of compressed-tensors.
"""

# O outputs, I inputs, G groups of inputs

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxft.checkpoint.quantized.matrices import QuantizedMatrix, unpack_first, unpack_last
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError

BITS = 4
PER_WORD = 32 // BITS
# AWQ interleaves the codes of a word: the k-th four bits belong to this of its eight columns.
AWQ_COLUMNS = np.array([0, 2, 4, 6, 1, 3, 5, 7])


@dataclass(frozen=True)
class GPTQMatrix:
    """MODULE.qweight int32 [I / 8, O], .qzeros [G, O / 8], .scales [G, O] and .g_idx [I], the group of every input.

    added: what is added to a stored zero: 1 in the first form of these files, 0 in gptq_v2.
    """

    module: str
    shape: tuple[int, int]
    group: int
    has_groups: bool
    added: int

    @property
    def parts(self) -> tuple[str, ...]:
        names = ("qweight", "qzeros", "scales", *(("g_idx",) if self.has_groups else ()))
        return tuple(f"{self.module}.{name}" for name in names)

    def rows(self, source: TensorSource, start: int, stop: int) -> np.ndarray:
        columns = (slice(None), slice(start, stop))
        codes_IO = unpack_first(source.read(f"{self.module}.qweight", columns), BITS)[: self.shape[1]]
        first, last = start // PER_WORD, -(-stop // PER_WORD)
        words = source.read(f"{self.module}.qzeros", (slice(None), slice(first, last)))
        zeros_GO = unpack_last(words, BITS)[:, start - first * PER_WORD : stop - first * PER_WORD]
        if self.added and np.any(zeros_GO == 2**BITS - 1):
            raise CheckpointError(
                f"{self.module}.qzeros has zeros of {2**BITS - 1}, which readers of GPTQ's first form take for "
                "different numbers. Take the model in its own precision"
            )
        if self.has_groups:
            groups_I = source.read(f"{self.module}.g_idx").astype(np.int64)
        else:
            groups_I = np.arange(self.shape[1]) // self.group
        scales_GO = source.read(f"{self.module}.scales", columns).astype(np.float32)
        centered_IO = codes_IO.astype(np.float32) - (zeros_GO.astype(np.float32) + self.added)[groups_I]
        return np.ascontiguousarray((centered_IO * scales_GO[groups_I]).T)


@dataclass(frozen=True)
class AWQMatrix:
    """MODULE.qweight int32 [I, O / 8], .qzeros [G, O / 8] and .scales [G, O]."""

    module: str
    shape: tuple[int, int]
    group: int

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(f"{self.module}.{name}" for name in ("qweight", "qzeros", "scales"))

    def rows(self, source: TensorSource, start: int, stop: int) -> np.ndarray:
        first, last = start // PER_WORD, -(-stop // PER_WORD)
        inside = slice(start - first * PER_WORD, stop - first * PER_WORD)
        codes_IO, zeros_GO = (
            self._unpack(source.read(f"{self.module}.{name}", (slice(None), slice(first, last))))[:, inside]
            for name in ("qweight", "qzeros")
        )
        scales_GO = source.read(f"{self.module}.scales", (slice(None), slice(start, stop))).astype(np.float32)
        groups_I = np.arange(self.shape[1]) // self.group
        centered_IO = codes_IO.astype(np.float32) - zeros_GO.astype(np.float32)[groups_I]
        return np.ascontiguousarray((centered_IO * scales_GO[groups_I]).T)

    @staticmethod
    def _unpack(words: np.ndarray) -> np.ndarray:
        codes = unpack_last(words, BITS).reshape(len(words), -1, PER_WORD)
        out = np.empty_like(codes)
        out[..., AWQ_COLUMNS] = codes
        return out.reshape(len(words), -1)


@dataclass(frozen=True)
class PackedMatrix:
    """compressed-tensors' pack-quantized: NAME_packed int32 [O, I / 8 or more], NAME_scale [O, G], NAME_shape.

    Of asymmetric ones also NAME_zero_point int32 [O / 8, G], whose words hold the zeros of eight outputs; of others the
    zero is the middle, 8. NAME_g_idx [I]: the group of every input, if inputs were reordered. bits: 4 or 8.
    """

    name: str
    shape: tuple[int, int]
    groups: int
    bits: int
    has_zeros: bool
    has_groups: bool

    @property
    def parts(self) -> tuple[str, ...]:
        ends = (("_zero_point",) if self.has_zeros else ()) + (("_g_idx",) if self.has_groups else ())
        return tuple(self.name + end for end in ("_packed", "_scale", "_shape", *ends))

    def rows(self, source: TensorSource, start: int, stop: int) -> np.ndarray:
        codes_OI = unpack_last(source.read(self.name + "_packed", (slice(start, stop),)), self.bits)
        codes_OI = codes_OI[:, : self.shape[1]].astype(np.float32)
        scales_OG = source.read(self.name + "_scale", (slice(start, stop),)).astype(np.float32)
        groups_I = np.arange(self.shape[1]) // -(-self.shape[1] // self.groups)
        if self.has_groups:
            given = source.read(self.name + "_g_idx").astype(np.int64)
            groups_I = given if np.all(given >= 0) else groups_I
        zeros_OG: np.ndarray = np.full(scales_OG.shape, 2 ** (self.bits - 1), np.float32)
        if self.has_zeros:
            per_word = 32 // self.bits
            first, last = start // per_word, -(-stop // per_word)
            words = source.read(self.name + "_zero_point", (slice(first, last),))
            zeros = unpack_first(words, self.bits)[start - first * per_word : stop - first * per_word]
            zeros_OG = zeros.astype(np.float32)
        return (codes_OI - zeros_OG[:, groups_I]) * scales_OG[:, groups_I]


def find_gptq(specs: Mapping[str, TensorSpec], *, added: int) -> dict[str, QuantizedMatrix]:
    """GPTQ's 4-bit matrices by name. Raises CheckpointError for those whose tensors do not fit each other."""
    out: dict[str, QuantizedMatrix] = {}
    for module, (words, outputs) in _modules(specs).items():
        inputs, groups = words * PER_WORD, specs[f"{module}.scales"].shape[0]
        _expect(specs, f"{module}.scales", (groups, outputs))
        _expect(specs, f"{module}.qzeros", (groups, -(-outputs // PER_WORD)))
        has_groups = f"{module}.g_idx" in specs
        if has_groups:
            _expect(specs, f"{module}.g_idx", (inputs,))
        out[f"{module}.weight"] = GPTQMatrix(module, (outputs, inputs), -(-inputs // groups), has_groups, added)
    return out


def find_awq(specs: Mapping[str, TensorSpec]) -> dict[str, QuantizedMatrix]:
    """AWQ's 4-bit matrices by name. Raises CheckpointError for those whose tensors do not fit each other."""
    out: dict[str, QuantizedMatrix] = {}
    for module, (inputs, words) in _modules(specs).items():
        outputs, groups = words * PER_WORD, specs[f"{module}.scales"].shape[0]
        _expect(specs, f"{module}.scales", (groups, outputs))
        _expect(specs, f"{module}.qzeros", (groups, words))
        if inputs % groups:
            raise CheckpointError(f"{module}: {inputs} inputs do not divide into {groups} groups")
        out[f"{module}.weight"] = AWQMatrix(module, (outputs, inputs), inputs // groups)
    return out


def find_packed(source: TensorSource) -> dict[str, QuantizedMatrix]:
    """compressed-tensors' packed matrices by name. Raises CheckpointError for those that are not whole."""
    specs, out = source.specs(), dict[str, QuantizedMatrix]()
    for packed in (name for name in specs if name.endswith("_packed")):
        name = packed.removesuffix("_packed")
        if f"{name}_scale" not in specs or f"{name}_shape" not in specs:
            raise CheckpointError(f"{packed} has no {name}_scale or no {name}_shape: the files are not whole")
        outputs, inputs = (int(size) for size in source.read(f"{name}_shape"))
        words = specs[packed].shape[-1]
        bits = next((bits for bits in (4, 8) if -(-inputs * bits // 32) == words), None)
        scales = specs[f"{name}_scale"].shape
        if bits is None or specs[packed].shape != (outputs, words) or len(scales) != 2 or scales[0] != outputs:
            raise CheckpointError(
                f"{packed} {list(specs[packed].shape)} with scales {list(scales)} is no matrix [{outputs}, {inputs}] "
                "of 4 or 8 bits a weight, with scales for groups of inputs. Take the model in its own precision"
            )
        if f"{name}_zero_point" in specs:
            _expect(specs, f"{name}_zero_point", (-(-outputs * bits // 32), scales[1]))
        has = (f"{name}_zero_point" in specs, f"{name}_g_idx" in specs)
        out[name] = PackedMatrix(name, (outputs, inputs), scales[1], bits, *has)
    return out


def _modules(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, int]]:
    """The modules with a qweight, and its shape. Raises CheckpointError for one without scales or zeros."""
    out = {}
    for name, spec in specs.items():
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            lost = [end for end in ("scales", "qzeros") if f"{module}.{end}" not in specs]
            if lost or len(spec.shape) != 2 or spec.dtype != np.int32:
                raise CheckpointError(
                    f"{name} is {list(spec.shape)} {spec.dtype} without {', '.join(lost) or 'a fault of its parts'}: "
                    "only int32 matrices with scales and qzeros are read"
                )
            out[module] = (spec.shape[0], spec.shape[1])
    return out


def _expect(specs: Mapping[str, TensorSpec], name: str, shape: tuple[int, ...]) -> None:
    there = specs[name].shape if name in specs else None
    if there != shape:
        raise CheckpointError(
            f"{name} is {'missing' if there is None else list(there)}, not {list(shape)} as the codes need it: the "
            "files are not whole, or of another form"
        )
