"""The kernel, interpreted on the CPU, against NF4's dense values and a product; and a layer compiled for TPUs."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.config import MeshConfig
from jaxft.hardware.compile import ENVIRONMENT
from jaxft.hardware.costs import costs_of
from jaxft.hardware.hlo import parse
from jaxft.nn import linear
from jaxft.nn.frozen import suits_tiles, tiled_product
from jaxft.quant import FORMATS, dense, nf4_matmul
from jaxft.sharding.mesh import make_mesh_plan


def drawn(dtype, name="nf4-dq", rows=(2, 512), inputs=1024, outputs=640):
    one, two, three = jax.random.split(jax.random.key(0), 3)
    kernel = FORMATS[name].quantize(0.02 * jax.random.normal(one, (inputs, outputs)))
    return jax.random.normal(two, (*rows, inputs), dtype), kernel, jax.random.normal(three, (*rows, outputs), dtype)


def both_ways(multiply, x, kernel, grad):
    y, pull = jax.vjp(lambda x: multiply(x, kernel), x)
    return y, pull(grad)[0]


def tiled(x, kernel):
    return tiled_product(lambda kernel: linear._gather_codes("outputs", kernel), x, kernel, True)


@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)], ids=["float32", "bfloat16"])
def test_the_kernel_is_the_dense_product_both_ways(name, dtype, rtol):
    """Two tiles of inputs are added up, and five of outputs; bfloat16 may round the sum the other way, once."""
    x, kernel, grad = drawn(dtype, name)
    weights = np.asarray(dense(kernel, dtype), np.float64)
    theirs = np.asarray(x, np.float64) @ weights, np.asarray(grad, np.float64) @ weights.T
    for our, their in zip(both_ways(tiled, x, kernel, grad), theirs, strict=True):
        assert our.dtype == dtype
        np.testing.assert_allclose(np.asarray(our, np.float64), their, rtol=rtol, atol=rtol * np.abs(their).max())


def test_devices_gather_the_codes_and_multiply_their_own_rows():
    args = drawn(jnp.bfloat16, rows=(8, 1024), inputs=512, outputs=128)
    one = both_ways(tiled, *args)
    plan = make_mesh_plan(MeshConfig(fsdp=8))
    x, kernel, grad = args
    x, grad = (jax.device_put(rows, NamedSharding(plan.mesh, P("fsdp"))) for rows in (x, grad))
    kernel = kernel.map_arrays(lambda part: jax.device_put(part, NamedSharding(plan.mesh, P("fsdp"))))
    eight = jax.jit(plan.bind(lambda *args: both_ways(tiled, *args)))(x, kernel, grad)
    jax.tree.map(np.testing.assert_array_equal, eight, one)


def test_a_block_is_the_largest_that_divides_the_rows_and_fits():
    kernel = drawn(jnp.float32)[1]
    assert nf4_matmul.block_rows(8192, kernel, 2) == 2048 and nf4_matmul.block_rows(8192, kernel, 4) == 1024
    assert nf4_matmul.block_rows(1536, kernel, 2) == 1536
    assert nf4_matmul.block_rows(1000, kernel, 2) is None and nf4_matmul.block_rows(896, kernel, 2) is None
    with pytest.raises(ValueError, match="do not divide into whole tiles"):
        nf4_matmul.matmul(jnp.zeros((896, 1024)), kernel)
    assert nf4_matmul.block_rows(8192, FORMATS["nf4"].quantize(jnp.zeros((576, 128))), 2) is None
    assert nf4_matmul.block_rows(8192, FORMATS["nf4"].quantize(jnp.zeros((2, 512, 128))), 2) is None


def test_only_tpus_for_which_it_pays_and_whole_rows_use_it(monkeypatch):
    x, kernel, _ = drawn(jnp.bfloat16)
    assert not suits_tiles(x, kernel)  # on a CPU
    monkeypatch.setattr("jaxft.nn.partition.platform", lambda: "tpu")
    cases = [("TPU v5 lite", 2, True), ("TPU v5", 2, True), ("TPU v5", 1, False), ("TPU v4", 4, False)]
    for kind, rows, suits in [*cases, ("TPU v6 lite", 2, False), ("TPU v6 lite", 4, True)]:
        monkeypatch.setattr("jaxft.nn.partition.device_kind", lambda kind=kind: kind)
        assert suits_tiles(jnp.zeros((rows, 512, 1024), jnp.bfloat16), kernel) == suits, (kind, rows)
    monkeypatch.setattr("jaxft.nn.partition.device_kind", lambda: "TPU v5 lite")
    assert not suits_tiles(x.astype(jnp.float32), kernel)
    assert not suits_tiles(x, FORMATS["int8"].quantize(jnp.zeros((1024, 640))))
    many = jnp.zeros((8, 1024, 1024), jnp.bfloat16)
    for axes, suits in [({"fsdp": 8}, True), ({"fsdp": 4, "tensor": 2}, False)]:
        assert make_mesh_plan(MeshConfig(**axes)).bind(suits_tiles)(many, kernel) == suits, axes
    assert not make_mesh_plan(MeshConfig(fsdp=8)).bind(suits_tiles)(many[:4], kernel)  # half a row for each


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles for TPU with libtpu")
@pytest.mark.parametrize(
    ("topology", "axes"),
    [("v5e:1x1", {}), pytest.param("v5e:2x2", {"fsdp": 4}, marks=pytest.mark.slow)],
    ids=["one chip", "four chips"],
)
def test_no_dense_weights_are_in_main_memory(topology, axes, monkeypatch):
    from jaxft.hardware.topology import devices
    from jaxft.hardware.topology import parse as topology_of

    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    plan = make_mesh_plan(MeshConfig(**axes), devices(topology_of(topology)))
    chips, inputs, outputs = plan.mesh.size, 1024, 1536
    split = NamedSharding(plan.mesh, P("fsdp"))
    x, kernel, grad = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split if leaf.ndim > 1 else None),
        jax.eval_shape(lambda: drawn(jnp.bfloat16, "nf4", (4, 512 * chips), inputs, outputs)),
    )

    def multiply(x, kernel):
        return linear.product(x, kernel, "outputs")

    text = jax.jit(plan.bind(lambda *args: both_ways(multiply, *args))).lower(x, kernel, grad).compile().as_text()
    assert not re.search(rf"(bf16|f32)\[({inputs},{outputs}|{outputs},{inputs}|\d+,2,32,{outputs})\]", text)
    costs = costs_of(parse(text), plan.axes)
    # Products of 2,048 rows on each chip, forward and back, in one block of rows each.
    assert costs.flops == 2 * 2 * 2048 * inputs * outputs and not costs.unknown
    assert (costs.dequantized, costs.tiled) == (0, 2 * inputs * outputs)
    monkeypatch.setattr(linear, "suits_tiles", lambda x, kernel: False)
    text = jax.jit(plan.bind(lambda *args: both_ways(multiply, *args))).lower(x, kernel, grad).compile().as_text()
    costs = costs_of(parse(text), plan.axes)
    assert (costs.dequantized, costs.tiled) == (2 * inputs * outputs, 0)
