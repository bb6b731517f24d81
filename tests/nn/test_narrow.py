"""Products of 8-bit operands against NumPy, their gradients, and a step of training with them."""

# I inputs, O outputs

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft import models
from jaxft.adapters.make import attach_adapter
from jaxft.config import AdapterConfig, MeshConfig
from jaxft.data.batch import Batch
from jaxft.nn.linear import Linear, product
from jaxft.nn.quantized import use_matmul
from jaxft.objectives.sft import sft_loss
from jaxft.quant import FORMATS, dense
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.training.state import divide

ROWS, INPUTS, OUTPUTS = (8, 32), 96, 80
# (type, largest value) forward and of gradients.
TYPES = {
    "int8": ((np.int8, 127), (np.int8, 127)),
    "fp8": ((ml_dtypes.float8_e4m3fn, 448), (ml_dtypes.float8_e5m2, 57344)),
}
# The largest error of a rounded number as a share of itself, and beside it as a share of the largest of its row.
ERRORS = {"int8": ((0, 0.5 / 127), (0, 0.5 / 127)), "fp8": ((2**-4, 2**-10 / 448), (2**-3, 2**-17 / 57344))}


def drawn(seed: int, *shape: int) -> np.ndarray:
    # Rows of unlike sizes, so that a scale for all of them would not do.
    draws = np.random.default_rng(seed)
    return np.float32(draws.standard_normal(shape) * np.exp(draws.standard_normal((*shape[:-1], 1))))


X, KERNEL, GRAD = drawn(0, *ROWS, INPUTS), drawn(1, INPUTS, OUTPUTS), drawn(2, *ROWS, OUTPUTS)


def rounded(x: np.ndarray, form: tuple[type, float], axis: int) -> np.ndarray:
    dtype, most = form
    scale = np.abs(x).max(axis, keepdims=True) / most
    codes = np.round(x / scale) if dtype is np.int8 else x / scale
    return codes.astype(dtype).astype(np.float64) * scale


def pulled(name, x, kernel, grad, tp_side="outputs"):
    y, pull = jax.vjp(lambda x, kernel: product(x, kernel, tp_side, name), x, kernel)
    return y, *pull(grad)


@pytest.mark.parametrize("name", TYPES)
def test_a_product_is_that_of_rounded_operands_and_so_is_the_gradient_of_its_rows(name):
    y, grad_x, grad_kernel = map(np.asarray, jax.jit(partial(pulled, name))(X, KERNEL, GRAD))
    forward, backward = TYPES[name]
    kernel = rounded(KERNEL, forward, 0)
    # A number that lies between two codes may be rounded to either: a few results differ by so much, and no more.
    for found, expected in (
        (y, rounded(X, forward, -1) @ kernel),
        (grad_x, _times_scales(GRAD, KERNEL, forward, backward)),
    ):
        size = np.abs(expected).max()
        assert np.mean(np.abs(found - expected) > 1e-5 * size) < 0.01
        assert np.abs(found - expected).max() < 0.02 * size
    # The gradient of the kernel stays as it is: the same sums of the same numbers.
    plain = jax.jit(partial(pulled, None))(X, KERNEL, GRAD)
    np.testing.assert_array_equal(grad_kernel, plain[2])


def _times_scales(grad: np.ndarray, kernel: np.ndarray, forward: tuple, backward: tuple) -> np.ndarray:
    scales = np.abs(kernel).max(0) / forward[1]
    return rounded(grad * scales, backward, -1) @ (rounded(kernel, forward, 0) / scales).T


@pytest.mark.parametrize("name", TYPES)
def test_its_error_is_within_what_rounding_allows(name):
    y, grad_x, _ = map(np.float64, jax.jit(partial(pulled, name))(X, KERNEL, GRAD))
    (own, of_row), (own_back, of_row_back) = ERRORS[name]
    x, kernel, grad = np.float64(X), np.float64(KERNEL), np.float64(GRAD)
    error_x = own * np.abs(x) + of_row * np.abs(x).max(-1, keepdims=True)
    error_kernel = own * np.abs(kernel) + of_row * np.abs(kernel).max(0)
    error_grad = own_back * np.abs(grad) + of_row_back * np.abs(grad * np.abs(kernel).max(0)).max(
        -1, keepdims=True
    ) / np.abs(kernel).max(0)
    bound = error_x @ np.abs(kernel) + np.abs(x) @ error_kernel + error_x @ error_kernel
    assert (np.abs(y - x @ kernel) <= 1.001 * bound).all()
    bound = error_grad @ np.abs(kernel.T) + np.abs(grad) @ error_kernel.T + error_grad @ error_kernel.T
    assert (np.abs(grad_x - grad @ kernel.T) <= 1.001 * bound).all()


@pytest.mark.parametrize(("name", "format"), [("int8", "int8"), ("int8", "nf4-dq"), ("fp8", "int4")])
def test_quantised_kernels_are_multiplied_too_and_get_no_gradient(name, format):
    x = np.tile(X, (1, 1, 2))
    kernel = FORMATS[format].quantize(jnp.tile(KERNEL, (2, 1)))

    def total(x, kernel):
        return (product(x, kernel, "outputs", name) * GRAD).sum()

    y = jax.jit(product, static_argnums=(2, 3))(x, kernel, "outputs", name)
    whole = np.float64(dense(kernel, jnp.float32))
    if format == "int8":  # its codes are operands as they are
        expected = rounded(x, TYPES["int8"][0], -1) @ whole
        assert np.mean(np.abs(y - expected) > 1e-5 * np.abs(expected).max()) < 0.01
    assert np.linalg.norm(y - x @ whole) < 0.05 * np.linalg.norm(x @ whole)
    grad = jax.jit(jax.grad(total))(x, kernel)
    assert np.linalg.norm(grad - GRAD @ whole.T) < 0.1 * np.linalg.norm(GRAD @ whole.T)


@pytest.mark.parametrize(("name", "operand"), [("int8", "i8"), ("fp8", "f8_e4m3fn")])
def test_two_of_three_products_are_narrow(name, operand):
    whole = jax.jit(partial(pulled, name)).lower(X, KERNEL, GRAD).compile().as_text()
    assert whole.count(" dot(") == 3
    frozen = str(jax.make_jaxpr(jax.grad(lambda x: product(x, KERNEL, "outputs", name).sum()))(X))
    assert frozen.count("dot_general") == 2 and operand in frozen


@pytest.mark.parametrize("tp_side", ["inputs", "outputs"])
def test_eight_devices_equal_one(tp_side):
    plan = make_mesh_plan(MeshConfig(data=2, fsdp=4))
    x, grad = (X, GRAD)
    axes = {"outputs": P("fsdp", None), "inputs": P(None, "fsdp")}
    kernel = jax.device_put(KERNEL, NamedSharding(plan.mesh, axes[tp_side]))
    step = partial(pulled, "int8", tp_side=tp_side)
    ours, theirs = jax.jit(plan.bind(step))(x, kernel, grad), jax.jit(step)(x, KERNEL, grad)
    # A scale of the last bit apart may turn a code.
    for one, other in zip(ours, theirs, strict=True):
        assert np.linalg.norm(np.asarray(one) - np.asarray(other)) < 1e-3 * np.linalg.norm(other)


SIZES = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_gradients_of_a_model_point_where_those_in_float32_do(kind):
    module = models.random_model(models.config_from_hf(SIZES), seed=0, remat="full")
    attach_adapter(module, AdapterConfig(kind=kind, r=4), 0)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 32)).astype(np.int32)
    places = np.broadcast_to(np.arange(32, dtype=np.int32), tokens.shape)
    batch = Batch(tokens, np.roll(tokens, -1, 1), np.ones(tokens.shape, np.float32), places, np.ones_like(tokens))

    def gradient():
        graphdef, trainable, frozen = divide(module)

        def loss(trainable):
            sums = sft_loss(nnx.merge(graphdef, trainable, frozen), batch, None)
            return sums.total / sums.weight

        value, grads = jax.jit(jax.value_and_grad(loss))(trainable)
        return float(value), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])

    plain_loss, plain = gradient()
    use_matmul(module, "int8")
    chosen = {layer.matmul_dtype for _, layer in nnx.iter_modules(module) if isinstance(layer, Linear)}
    assert chosen == {"int8"}
    loss, narrow = gradient()
    assert loss != plain_loss and abs(loss - plain_loss) < 1e-3 * plain_loss
    assert plain @ narrow > 0.999 * np.linalg.norm(plain) * np.linalg.norm(narrow)
