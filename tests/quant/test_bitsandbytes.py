"""Codes, scales and values against bitsandbytes on CPU, bit for bit where it says so."""

# O outputs, I inputs

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.quant import FORMATS
from jaxft.quant.dynamic import dynamic_map, nearest
from jaxft.quant.nf4 import LEVELS
from jaxft.quant.nibbles import unpack
from jaxft.quant.scales import compress

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(256, 192), (64, 1024), (960, 320), (96, 64)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(shape, dtype=torch.float32, seed=0):
    """[O, I], one block of zeros and one outlier included."""
    w = 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    w[0, :64] = 0.0
    w[1, 3] = 2.5
    return w.to(dtype)


def kernel(w):
    """Our [I, O] of a torch weight, in its type."""
    return jnp.asarray(w.float().numpy().T, dtype=str(w.dtype).removeprefix("torch."))


def codes_of(packed, shape):
    """bitsandbytes' codes of a weight [O, I], as ours lie: [I, O]."""
    flat = packed.numpy().ravel()
    return np.stack([flat >> 4, flat & 15], axis=-1).reshape(shape).T


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_theirs(signed):
    np.testing.assert_array_equal(dynamic_map(signed=signed), bnb.create_dynamic_map(signed=signed).numpy())


def test_the_levels_are_theirs():
    np.testing.assert_array_equal(LEVELS, bnb.get_4bit_type("nf4", device="cpu").numpy())


def test_eight_bit_codes_are_theirs_bit_for_bit():
    x = torch.randn(400, 256, generator=torch.Generator().manual_seed(0))
    theirs, state = bnb.quantize_blockwise(x, blocksize=256)
    largest = np.abs(x.numpy()).max(axis=-1, keepdims=True)
    np.testing.assert_array_equal(largest.ravel(), state.absmax.numpy())
    scaled = jnp.asarray(x.numpy()) * (1.0 / jnp.asarray(largest))
    np.testing.assert_array_equal(np.asarray(nearest(scaled, signed=True)), theirs.numpy())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_nf4_is_theirs_bit_for_bit(shape, dtype):
    w = weight(shape, dtype)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = jax.jit(FORMATS["nf4"].quantize)(kernel(w))
    np.testing.assert_array_equal(np.asarray(unpack(ours.codes)).reshape(shape[::-1]), codes_of(packed, shape))
    np.testing.assert_array_equal(np.asarray(ours.scales).T.ravel(), state.absmax.numpy())
    values = bnb.dequantize_4bit(packed, state)
    np.testing.assert_array_equal(np.asarray(ours.dense(kernel(w).dtype), np.float32), values.float().numpy().T)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_double_quantised_scales_are_theirs_bit_for_bit(shape):
    w = weight(shape)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    plain = FORMATS["nf4"].quantize(kernel(w))
    # Their mean of the scales is a sum whose order, and with it the last bit, depends on the machine.
    ours = jax.jit(compress)(plain.scales, jnp.float32(state.offset.item()))
    np.testing.assert_array_equal(np.asarray(ours.codes).T.ravel(), state.absmax.numpy())
    np.testing.assert_array_equal(np.asarray(ours.largest), state.state2.absmax.numpy())
    mean = float(FORMATS["nf4-dq"].quantize(kernel(w)).scales.mean)
    assert abs(mean - state.offset.item()) <= 2 * np.spacing(np.float32(mean))
    values = bnb.dequantize_4bit(packed, state).numpy().T
    dense = np.asarray(type(plain)(plain.codes, ours).dense(jnp.float32))
    np.testing.assert_allclose(dense, values, rtol=0, atol=np.spacing(np.abs(values).max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_theirs(shape):
    w = weight(shape, torch.float16)
    theirs, largest, _ = bnb.int8_vectorwise_quant(w)
    ours = FORMATS["int8"].quantize(kernel(w))
    np.testing.assert_array_equal(np.asarray(ours.codes).T, theirs.numpy())
    # XLA divides by a constant through its reciprocal.
    np.testing.assert_array_max_ulp(np.asarray(ours.scales)[0], largest.numpy() / np.float32(127), maxulp=1)
