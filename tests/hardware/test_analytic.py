"""Bytes per weight that estimates use, against the arrays of each format."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.quant import FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_of_a_quantized_weight(name):
    value = jax.eval_shape(FORMATS[name].quantize, jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(value))
    assert size / 4096**2 == pytest.approx(FORMATS[name].bytes_per_weight, rel=2e-3)
