"""Quantised formats for frozen weights, by name, and the values that replace their kernels."""

from functools import partial

from jaxft.quant import integer, nf4, scales
from jaxft.quant.array import Format as Format
from jaxft.quant.array import QuantizedArray as QuantizedArray
from jaxft.quant.array import dense as dense
from jaxft.quant.array import is_quantized as is_quantized
from jaxft.quant.array import kernel_path as kernel_path

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        # Four bits of code, and a float32 scale for each block.
        Format(
            name="nf4", quantize=partial(nf4.quantize, double=False), bytes_per_weight=0.5 + 4 / nf4.BLOCK,
            block=nf4.BLOCK,
        ),
        # The scales in eight bits, and a float32 magnitude for each group of them.
        Format(
            name="nf4-dq", quantize=partial(nf4.quantize, double=True),
            bytes_per_weight=0.5 + 1 / nf4.BLOCK + 4 / nf4.BLOCK / scales.GROUP, block=nf4.BLOCK,
        ),
        Format(name="int8", quantize=integer.int8, bytes_per_weight=1.0),
        Format(name="int4", quantize=integer.int4, bytes_per_weight=0.5 + 4 / integer.BLOCK, block=integer.BLOCK),
    )
}  # fmt: skip
