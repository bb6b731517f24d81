"""Frozen weights in fewer bits: values that stand where a kernel stood, and the formats by name."""

from functools import partial

from jaxft.quant import integer, nf4
from jaxft.quant.array import Format as Format
from jaxft.quant.array import QuantizedArray as QuantizedArray
from jaxft.quant.array import dense as dense
from jaxft.quant.array import is_quantized as is_quantized
from jaxft.quant.array import kernel_path as kernel_path

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(name="nf4", quantize=partial(nf4.quantize, double=False), block=nf4.BLOCK),
        Format(name="nf4-dq", quantize=partial(nf4.quantize, double=True), block=nf4.BLOCK),
        Format(name="int8", quantize=integer.int8),
        Format(name="int4", quantize=integer.int4, block=integer.BLOCK),
    )
}
