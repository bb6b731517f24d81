"""MXFP4 weights, read as bfloat16 matrices.

A number has four bits: a sign, two bits of exponent and one of mantissa. 32 of them along the inputs share a scale, a
power of two in one byte. Source of the format: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 and 5.4. Files
of gpt-oss keep a tensor NAME as NAME_blocks, two numbers in a byte, the first in its low bits, and NAME_scales.
"""

# E experts, I inputs, O outputs, G groups of 32 inputs, B bytes of a group: 16

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.checkpoint.hf import copy_into
from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds
from jaxft.errors import CheckpointError, listed

GROUP = 32
BLOCKS, SCALES = "_blocks", "_scales"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS, NO_NUMBER = 127, 255  # of the scale


def is_packed(hf_config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the tensors are in this format."""
    given = hf_config.get("quantization_config")
    return isinstance(given, Mapping) and given.get("quant_method") == "mxfp4"


class MXFP4Source:
    """A source whose packed tensors, [E, O, G, B] and [E, O, G] bytes, appear as one [E, I, O] bfloat16 tensor.

    bfloat16 has every number of the format, so nothing is rounded; scales near the end of the range give infinities, as
    in transformers. One expert's matrix is unpacked at a time. Other tensors stay as they are.
    Raises CheckpointError listing blocks and scales that do not fit each other, before any is read.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source, specs = source, source.specs()
        self._shapes: dict[str, tuple[int, ...]] = {}
        problems = []
        for name in dict.fromkeys(_names(specs)):
            if problem := _problem(specs.get(name + BLOCKS), specs.get(name + SCALES)):
                problems.append(f"{name}: {problem}")
            else:
                experts, outputs, groups, _ = specs[name + BLOCKS].shape
                self._shapes[name] = (experts, groups * GROUP, outputs)
        if problems:
            lines = listed(problems, 20, lines=True)
            raise CheckpointError(f"{len(problems)} tensors are not whole in MXFP4:\n{lines}")

    def specs(self) -> dict[str, TensorSpec]:
        out = {}
        for source_name, spec in self._source.specs().items():
            name = source_name.removesuffix(BLOCKS).removesuffix(SCALES)
            out[name] = TensorSpec(self._shapes[name], BFLOAT16) if name in self._shapes else spec
        return out

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if name not in self._shapes:
            return self._source.read(name, index)
        (first, last), (low, high), outputs = block_bounds(self._shapes[name], index)
        out_EIO = np.empty((last - first, high - low, outputs[1] - outputs[0]), BFLOAT16)
        start = low // GROUP
        for at, expert in enumerate(range(first, last)):
            cut = (slice(expert, expert + 1), slice(*outputs), slice(start, -(-high // GROUP)))
            blocks_OGB, scales_OG = (self._source.read(name + part, cut)[0] for part in (BLOCKS, SCALES))
            if np.any(scales_OG == NO_NUMBER):
                raise CheckpointError(f"{name}: a scale of expert {expert} is {NO_NUMBER}, which is not a number")
            values_OI = unpack(blocks_OGB, scales_OG)[:, low - start * GROUP : high - start * GROUP]
            copy_into(out_EIO[at], values_OI.T)
        return out_EIO


def unpack(blocks_OGB: np.ndarray, scales_OG: np.ndarray) -> np.ndarray:
    """One matrix, [O, I] bfloat16, from its bytes."""
    # One look-up for each byte: the byte and its scale are the index of a row of the table.
    pairs_OGB = _table()[(scales_OG.astype(np.uint16) << 8)[..., None] | blocks_OGB]
    return pairs_OGB.reshape(len(blocks_OGB), -1).view(BFLOAT16)


@functools.cache
def _table() -> np.ndarray:
    """[2^16] uint32: the two bfloat16 numbers of a byte under a scale, at 256 scale + byte."""
    code = np.array([*POSITIVE, *(-value for value in POSITIVE)], np.float32)
    byte = np.arange(256)
    pairs = np.stack([code[byte & 15], code[byte >> 4]], axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.exp2(np.arange(256) - BIAS).astype(np.float32)
        return (scale[:, None, None] * pairs).astype(BFLOAT16).view(np.uint32).reshape(-1)


def _names(specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    for name in specs:
        for suffix in (BLOCKS, SCALES):
            if name.endswith(suffix):
                yield name.removesuffix(suffix)


def _problem(blocks: TensorSpec | None, scales: TensorSpec | None) -> str | None:
    if blocks is None or scales is None:
        return f"has no {BLOCKS if blocks is None else SCALES}"
    if blocks.dtype != np.uint8 or scales.dtype != np.uint8:
        return f"blocks and scales are bytes, not {blocks.dtype} and {scales.dtype}"
    if len(blocks.shape) != 4 or blocks.shape[-1] != GROUP // 2 or blocks.shape[:-1] != scales.shape:
        return f"blocks {list(blocks.shape)} and scales {list(scales.shape)} are not [E, O, G, 16] and [E, O, G]"
    return None
