"""NF4, 4-bit NormalFloat: 16 quantiles of a normal distribution, a scale per 64 weights (arXiv:2305.14314, 3)."""

# I inputs, O outputs, N blocks of 64 inputs

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxft.quant.array import TINY, QuantizedArray, blocks
from jaxft.quant.nibbles import BLOCK, pack, unpack
from jaxft.quant.scales import CompressedScales, compress, dense_scales

# The paper's appendix E, as float32.
LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
SCOPE = "nf4_dense"  # of the multiplication with scales in compiled programs: one for each dequantised weight
MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / np.float32(2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4(QuantizedArray):
    """codes: uint8 [..., I / 2, O], two indices of LEVELS in a byte, packed by `nibbles`.

    scales: the largest magnitude of every block of 64 consecutive inputs of one output, float32 [..., N, O], or the
    same compressed. Codes and scales are those of bitsandbytes for a weight [O, I].
    """

    codes: jax.Array
    scales: jax.Array | CompressedScales

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, half, outputs = self.codes.shape
        return (*stack, 2 * half, outputs)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        # The barrier ties the levels to the codes of a layer: otherwise XLA would broadcast each level to the size of a
        # kernel before the loop over layers, and keep it.
        packed, levels = jax.lax.optimization_barrier((self.codes, jnp.asarray(LEVELS)))
        scales = dense_scales(self.scales)[..., None, None, :]
        values = select(unpack(packed), list(levels))
        with jax.named_scope(SCOPE):
            weights = values * scales
        return weights.astype(dtype).reshape(self.shape)

    def map_arrays(self, change: Callable[[jax.Array], jax.Array]) -> Self:
        codes, scales = change(self.codes), self.scales
        scales = scales.map_arrays(change) if isinstance(scales, CompressedScales) else change(scales)
        return dataclasses.replace(self, codes=codes, scales=scales)


def quantize(kernel: jax.Array, *, double: bool) -> NF4:
    """Quantises a kernel [..., I, O]; I is a multiple of 64. double: compress the scales too (double quantisation)."""
    x = blocks(kernel, BLOCK)
    scales = jnp.max(jnp.abs(x), axis=-2)
    # Multiplied by the reciprocal and clipped, as in bitsandbytes: a quotient would differ in the last bit.
    scaled = jnp.clip(x * (1.0 / jnp.maximum(scales, TINY))[..., None, :], -1.0, 1.0).reshape(kernel.shape)
    codes = sum((scaled > middle).astype(jnp.uint8) for middle in MIDDLES)
    return NF4(pack(codes), compress(scales) if double else scales)


def select(codes: jax.Array, options: list[jax.Array]) -> jax.Array:
    """`options[code]` for every code: options are 16 arrays that broadcast against `codes`."""
    # A tree of selects, bit by bit: on a TPU, a lookup in a table takes more time and twice the memory.
    for bit in range(4):
        odd = codes >> bit & 1 == 1
        options = [jnp.where(odd, high, low) for low, high in zip(options[::2], options[1::2], strict=True)]
    return options[0]
