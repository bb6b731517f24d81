"""Every format: shapes, stacks, what it loses, and parts that stay together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import ModelConfig, choices
from jaxft.quant import FORMATS, dense, is_quantized, kernel_path
from jaxft.quant.nibbles import pack, unpack


def kernel(shape=(3, 128, 40), seed=0):
    return 0.02 * jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def test_the_config_knows_every_format():
    assert choices(ModelConfig, "quantization") == tuple(FORMATS)


def test_packing_is_undone_and_halves():
    codes = jax.random.randint(jax.random.key(0), (2, 192, 5), 0, 16).astype(jnp.uint8)
    packed = pack(codes)
    assert packed.shape == (2, 96, 5)
    np.testing.assert_array_equal(unpack(packed).reshape(codes.shape), codes)


@pytest.mark.parametrize("name", FORMATS)
def test_a_stack_is_quantised_layer_by_layer(name):
    """What a layer of a stack is must not depend on the layers beside it."""
    stack = kernel()
    whole, one = FORMATS[name].quantize(stack), FORMATS[name].quantize(stack[1])
    assert whole.shape == stack.shape and whole.ndim == 3 and one.shape == stack.shape[1:]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), whole[1], one)
    np.testing.assert_array_equal(np.asarray(whole[1].dense(jnp.bfloat16)), whole.dense(jnp.bfloat16)[1])


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name):
    assert not np.any(np.asarray(FORMATS[name].quantize(jnp.zeros((64, 4))).dense(jnp.float32)))


def test_errors_of_normal_weights_are_as_known():
    """Relative root mean square errors, of float32 values drawn normally: NF4 beats int4 at equal bits."""
    x = kernel((512, 512))

    def error(name):
        return float(jnp.sqrt(jnp.mean((FORMATS[name].quantize(x).dense(jnp.float32) - x) ** 2)) / jnp.std(x))

    errors = {name: error(name) for name in FORMATS}
    assert errors["int8"] < 0.01 < errors["nf4"] < 0.1 < errors["int4"] < 0.12
    assert abs(errors["nf4-dq"] - errors["nf4"]) < 0.01 * errors["nf4"]


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_what_the_format_promises(name):
    bits = {"nf4": 4.5, "nf4-dq": 4 + 8 / 64 + 32 / 64 / 256, "int8": 8 + 32 / 512, "int4": 4.5}
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(FORMATS[name].quantize(kernel((512, 512)))))
    assert 8 * stored / 512**2 == pytest.approx(bits[name], rel=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_each_reaches_every_array_with_the_kernels_axes(name):
    value = FORMATS[name].quantize(kernel())
    doubled = value.map_arrays(lambda part: jnp.concatenate([part, part], axis=-1))
    assert doubled.shape == (3, 128, 80)


def test_dense_takes_both():
    x = kernel()
    assert dense(x, jnp.bfloat16).dtype == jnp.bfloat16
    value = FORMATS["int8"].quantize(x)
    assert is_quantized(value) and not is_quantized(x)
    np.testing.assert_array_equal(dense(value, jnp.float32), value.dense(jnp.float32))


def test_paths_of_parts_lead_to_their_kernel():
    assert kernel_path("layers/0/q_proj/kernel/codes") == "layers/0/q_proj/kernel"
    assert kernel_path("layers/0/q_proj/kernel/scales/codes") == "layers/0/q_proj/kernel"
    assert kernel_path("layers/0/q_proj/kernel/scales/mean") == "layers/0/q_proj/kernel/scales/mean"
    assert kernel_path("norm/scale") == "norm/scale"
