"""Matrices in 8-bit floating point: one scale for all of them, for each output, or for each block.

NAME.weight [O, I] is float8, and the scale by which its values are multiplied is NAME.weight_scale_inv (block FP8, as
DeepSeek and Qwen publish it, and MXFP8) or NAME.weight_scale (compressed-tensors, FBGEMM, ModelOpt). Scales of MXFP8
are powers of two, of which a byte s keeps the exponent: 2^(s - 127). Source: `Fp8Dequantize` of transformers 5.24.
"""

# O outputs, I inputs

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError

FLOATS = tuple(np.dtype(kind) for kind in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))
SCALES = ("_scale_inv", "_scale")
# Scales of activations and of the cache, which a dense model has no use for; ModelOpt's global scale is not among them.
OTHERS = (
    ".activation_scale", ".activation_scale_inv", ".input_scale", ".input_scale_ub", ".input_global_scale",
    ".output_scale", ".k_scale", ".v_scale", ".kv_scale", ".q_scale",
)  # fmt: skip
BIAS = 127  # of the exponents in bytes


@dataclass(frozen=True)
class Float8Matrix:
    """name: of the float8 tensor. block: outputs and inputs that share a scale."""

    name: str
    scale: str
    shape: tuple[int, int]
    block: tuple[int, int]

    @property
    def parts(self) -> tuple[str, ...]:
        return self.name, self.scale

    def rows(self, source: TensorSource, start: int, stop: int) -> np.ndarray:
        values_OI = source.read(self.name, (slice(start, stop),)).astype(np.float32)
        scales = _values(source.read(self.scale))
        grid = tuple(-(-size // block) for size, block in zip(self.shape, self.block, strict=True))
        rows_O, columns_I = (
            np.arange(low, high) // block
            for (low, high), block in zip(((start, stop), (0, self.shape[1])), self.block, strict=True)
        )
        return values_OI * scales.reshape(grid)[rows_O][:, columns_I]


def find_float8(
    specs: Mapping[str, TensorSpec], block: tuple[int, int] | None
) -> tuple[dict[str, Float8Matrix], frozenset[str]]:
    """The float8 matrices that have scales, by name, and the names of scales that are not needed.

    block: of the config, if it names one. Raises CheckpointError for a matrix without scales, and for scales that fit
    no block.
    """
    matrices: dict[str, Float8Matrix] = {}
    for name, spec in specs.items():
        scale = next((name + end for end in SCALES if name + end in specs), None)
        if spec.dtype in FLOATS and len(spec.shape) == 2 and scale is None:
            raise CheckpointError(f"{name} is {spec.dtype} without a scale ({name}_scale_inv or {name}_scale)")
        if spec.dtype in FLOATS and len(spec.shape) == 2 and scale is not None:
            shape = (spec.shape[0], spec.shape[1])
            matrices[name] = Float8Matrix(name, scale, shape, _block(name, shape, specs[scale].shape, block))
    return matrices, frozenset(name for name in specs if name.endswith(OTHERS))


def _block(
    name: str, shape: tuple[int, int], scales: tuple[int, ...], given: tuple[int, int] | None
) -> tuple[int, int]:
    """The outputs and inputs that share a scale, from the shapes of a matrix and of its scales."""
    if np.prod(scales, dtype=int) == 1:
        return shape
    if scales in ((shape[0],), (shape[0], 1)):
        return 1, shape[1]
    if len(scales) == 2:
        fits = given is not None and tuple(-(-size // b) for size, b in zip(shape, given, strict=True)) == scales
        if given is not None and fits:
            return given
        if not (shape[0] % scales[0] or shape[1] % scales[1]):
            return shape[0] // scales[0], shape[1] // scales[1]
    raise CheckpointError(
        f"{name} {list(shape)} has scales {list(scales)}, which are neither one, nor one for each output, nor one for "
        f"each block{'' if given is None else f' of {list(given)}'}: the files are not whole"
    )


def _values(scales: np.ndarray) -> np.ndarray:
    if scales.dtype == np.uint8:
        return np.exp2(scales.astype(np.float32) - BIAS)
    return scales.astype(np.float32)
