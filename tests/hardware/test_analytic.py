"""Arithmetic of plans against what is stored."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.hardware.analytic import QUANTIZED
from jaxft.quant import FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_of_a_quantised_weight(name):
    value = jax.eval_shape(FORMATS[name].quantize, jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16))
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(value))
    assert stored / 4096**2 == pytest.approx(QUANTIZED[name], rel=2e-3)
