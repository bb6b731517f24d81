"""Products of sorted rows with the matrices of experts: each form against `jax.lax.ragged_dot`, and what it keeps."""

import importlib.util
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.hardware.costs import costs_of
from jaxft.hardware.hlo import parse
from jaxft.nn.experts import grouped as module
from jaxft.nn.experts import megablox
from jaxft.nn.experts.grouped import block_size, form_of, grouped

ROWS, EXPERTS, INPUTS, OUTPUTS = 150, 5, 24, 16


def operands(rows, experts, inputs, outputs, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, inputs), (experts, inputs, outputs), (rows, outputs)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def value_and_grads(form):
    def compute(x, kernel, aim, sizes):
        y, transpose = jax.vjp(lambda x, kernel: grouped(x, kernel, sizes, form), x, kernel)
        return y, *transpose(aim)

    return jax.jit(compute)


# Even; experts without rows, at both ends too; all rows of one; fewer rows than there are.
SIZES = [[30, 30, 30, 30, 30], [0, 97, 0, 53, 0], [0, 0, 150, 0, 0], [1, 0, 40, 16, 3]]


@pytest.mark.parametrize(
    ("form", "turn_bytes"),
    [("blocks", 0), ("blocks", 2**12), ("blocks", 2**26), ("megablox", None)],
    ids=["loop", "a few at once", "all at once", "megablox"],
)
def test_values_and_gradients_are_those_of_ragged_dot(form, turn_bytes, monkeypatch):
    monkeypatch.setitem(module.TURN_BYTES, "blocks", turn_bytes)
    x, kernel, aim = operands(ROWS, EXPERTS, INPUTS, OUTPUTS)
    ours, theirs = value_and_grads(form), value_and_grads("ragged")
    for sizes in SIZES:
        filled = (jnp.arange(ROWS) < sum(sizes))[:, None]
        args = jnp.where(filled, x, 0), kernel, jnp.where(filled, aim, 0), jnp.array(sizes, jnp.int32)
        for got, expected in zip(ours(*args), theirs(*args), strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5, err_msg=str(sizes))


def test_no_array_has_all_rows_for_all_experts():
    rows, experts, inputs, outputs = 4096, 32, 128, 64
    x, kernel, aim = operands(rows, experts, inputs, outputs, jnp.bfloat16)
    compiled = value_and_grads("blocks").lower(x, kernel, aim, jnp.zeros(experts, jnp.int32)).compile()
    text = compiled.as_text()
    arrays = [a for c in parse(text).computations.values() for i in c.instructions.values() for a in i.arrays]
    # The blocks, filled or not, hold at most half as many rows again as there are.
    size = block_size(rows, experts)
    padded = rows + experts * size
    assert padded <= 1.5 * rows
    blocks = padded // size
    largest = max(padded * max(inputs, outputs), blocks * inputs * outputs)
    assert max(math.prod(array.dims) for array in arrays) <= largest < rows * experts * inputs
    # Blocks of both sides; the matrices gathered for them; their gradients and the sums of these, in float32.
    bound = 4 * (padded * 2 * (inputs + outputs) + (experts + 3 * blocks) * inputs * outputs)
    assert compiled.memory_analysis().temp_size_in_bytes < bound


@pytest.mark.parametrize("side", [16, 576, 768, 1024, 1408, 2048, 2880, 4096, 5120, 7168, 14336])
def test_blocks_compute_little_beyond_the_sides_of_a_matrix(side):
    outputs, inputs = megablox.block_outputs(side, 768), megablox.block_inputs(side, 2048)
    for block, most in ((outputs, 768), (inputs, 2048)):
        assert block == side <= most or (block % megablox.LANES == 0 and block <= most)
        assert -(-side // block) * block <= 1.1 * side
    assert -(-side // inputs) == -(-side // 2048)


def test_a_layer_reads_its_matrices_in_the_stack():
    x, kernels, aim = operands(ROWS, 3 * EXPERTS, INPUTS, OUTPUTS)
    kernels = kernels.reshape(3, EXPERTS, INPUTS, OUTPUTS)

    @jax.jit
    def in_stack(x, kernel, aim, sizes, layer):
        stack = megablox.Stack(kernels, layer)
        product = lambda x, kernel: megablox.product_in_stack(x, kernel, stack, sizes)  # noqa: E731
        y, transpose = jax.vjp(product, x, kernel)
        return y, *transpose(aim)

    alone, unread = value_and_grads("megablox"), jnp.full(kernels.shape[1:], jnp.nan)
    for layer in range(3):
        sizes = jnp.array(SIZES[layer], jnp.int32)
        for got, expected in zip(
            in_stack(x, unread, aim, sizes, layer), alone(x, kernels[layer], aim, sizes), strict=True
        ):
            np.testing.assert_array_equal(got, expected)


@pytest.fixture
def on_tpu(monkeypatch):
    """Shapes of arrays on a TPU that is not here."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiles for a TPU with libtpu")
    from jax.experimental import topologies

    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(megablox, "_interpret", lambda: False)
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1))
    sharding = jax.sharding.SingleDeviceSharding(device.devices[0])
    return lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def test_a_tpu_copies_no_matrices_out_of_a_stack(on_tpu):
    layers, experts, width = 4, 8, 256

    def run(x, kernels, sizes):
        def body(x, scanned):
            kernel, layer = scanned
            stack = megablox.Stack(kernels, layer)
            return megablox.product_in_stack(x, kernel, stack, sizes), None

        return jax.lax.scan(body, x, (kernels, jnp.arange(layers)))[0]

    def gradient(x, kernels, aim, sizes):
        y, transpose = jax.vjp(lambda x: run(x, kernels, sizes), x)
        return y, transpose(aim)

    x, kernels, sizes = on_tpu((512, width)), on_tpu((layers, experts, width, width)), on_tpu((experts,), jnp.int32)
    compiled = jax.jit(gradient).lower(x, kernels, x, sizes).compile()
    arrays = [
        a for c in parse(compiled.as_text()).computations.values() for i in c.instructions.values() for a in i.arrays
    ]
    assert (experts, width, width) not in {array.dims for array in arrays}
    assert compiled.memory_analysis().temp_size_in_bytes < layers * experts * width * width
    # Rows, products and gradients beside the matrices, which each of the two passes reads once.
    assert costs_of(parse(compiled.as_text()), {}).hbm_bytes < 1.5 * 2 * layers * experts * width * width * 2


def test_a_tpu_multiplies_each_row_with_one_matrix(on_tpu):
    rows, experts, inputs, outputs = 4096, 32, 256, 16
    args = [
        on_tpu(x.shape, x.dtype)
        for x in (*operands(rows, experts, inputs, outputs, jnp.bfloat16), jnp.zeros(experts, jnp.int32))
    ]
    compiled = value_and_grads("megablox").lower(*args).compile()
    # The product and both gradients.
    assert 3 <= compiled.cost_analysis()["flops"] / (2 * rows * inputs * outputs) < 3.5


def test_forms_of_platforms(monkeypatch):
    monkeypatch.setattr("jaxft.optional._works", lambda: True)
    module._tokamax.cache_clear()
    monkeypatch.setitem(sys.modules, "tokamax", None)  # not installed
    forms = [form_of(platform, 10**12, inputs=64) for platform in ("cpu", "gpu", "tpu")]
    assert forms == ["loop", "blocks", "megablox"]
    assert form_of("cpu", 10**6, inputs=64) == form_of("tpu", 10**12, inputs=1) == "ragged"
    module._tokamax.cache_clear()
    calls = []

    def ragged_dot(lhs, rhs, group_sizes, *, implementation):
        calls.append(implementation)
        if lhs.dtype == jnp.float32:
            raise NotImplementedError
        return jax.lax.ragged_dot(lhs, rhs, group_sizes)

    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(ragged_dot=ragged_dot))
    assert form_of("gpu", 10**6, inputs=64) == "tokamax"
    sizes = jnp.array(SIZES[0], jnp.int32)
    for dtype in (jnp.bfloat16, jnp.float32):
        x, kernel, _ = operands(ROWS, EXPERTS, INPUTS, OUTPUTS, dtype)
        expected = jax.lax.ragged_dot(x, kernel, sizes)
        np.testing.assert_allclose(grouped(x, kernel, sizes, "tokamax"), expected, rtol=0, atol=1e-5)
    assert calls == ["triton"] * 2
    module._tokamax.cache_clear()
