"""The kernel, interpreted on the CPU, against NF4's dense values and a product; and compiled for TPUs."""

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.quant import FORMATS, dense


@pytest.fixture(scope="module")
def nf4_matmul() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        yield importlib.import_module("nf4_matmul")


def drawn(dtype, name="nf4-dq", rows=(2, 128), inputs=1024, outputs=640):
    one, two, three = jax.random.split(jax.random.key(0), 3)
    kernel = FORMATS[name].quantize(0.02 * jax.random.normal(one, (inputs, outputs)))
    return jax.random.normal(two, (*rows, inputs), dtype), kernel, jax.random.normal(three, (*rows, outputs), dtype)


@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)], ids=["float32", "bfloat16"])
def test_the_kernel_is_the_dense_product_both_ways(nf4_matmul, name, dtype, rtol):
    """Two tiles of inputs are added up, and five of outputs; bfloat16 may round the sum the other way, once."""
    x, kernel, grad = drawn(dtype, name)
    assert nf4_matmul.fits(256, kernel)
    y, pull = jax.vjp(lambda x: nf4_matmul.matmul(x, kernel, True), x)
    weights = np.asarray(dense(kernel, dtype), np.float64)
    for ours, theirs in (
        (y, np.asarray(x, np.float64) @ weights),
        (pull(grad)[0], np.asarray(grad, np.float64) @ weights.T),
    ):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())


def test_what_is_no_whole_tiles_is_for_the_other_form(nf4_matmul):
    kernel = drawn(jnp.float32)[1]
    assert not nf4_matmul.fits(100, kernel)
    odd = FORMATS["nf4"].quantize(jnp.zeros((576, 128)))
    assert not nf4_matmul.fits(128, odd)
    assert not nf4_matmul.fits(128, FORMATS["nf4"].quantize(jnp.zeros((2, 512, 128))))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles for TPU with libtpu")
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_it_compiles_for(nf4_matmul, topology, monkeypatch):
    from jaxft.hardware.topology import devices, parse

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    here = jax.sharding.SingleDeviceSharding(devices(parse(topology))[0])
    x, kernel, grad = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        jax.eval_shape(lambda: drawn(jnp.bfloat16, rows=(1, 2048), inputs=2048, outputs=7168)),
    )

    def both(x, kernel, grad):
        y, pull = jax.vjp(lambda x: nf4_matmul.matmul(x, kernel), x)
        return y, pull(grad)

    compiled = jax.jit(both).lower(x, kernel, grad).compile()
    assert compiled.as_text().count("custom-call(") >= 2
    # The scales, and nothing of the kernel's 14.7 million weights.
    assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 7168
