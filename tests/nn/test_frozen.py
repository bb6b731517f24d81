"""Quantised layers give what their dense kernels give, and keep nothing dense between the passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.config import AdapterConfig, MeshConfig
from jaxft.data.batch import Batch
from jaxft.errors import ModelError
from jaxft.hardware.groups import collectives
from jaxft.hardware.hlo import parse
from jaxft.nn.linear import Linear
from jaxft.nn.quantized import has_quantized_kernels, kernels
from jaxft.nn.storage import storage_dims_of
from jaxft.objectives.sft import sft_loss
from jaxft.quant import FORMATS, QuantizedArray, dense
from jaxft.runs.build import attach_adapter
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.training.state import divide

SIZES = {
    "vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


def model_of(family, format=None, **options):
    config = models.config_from_hf(SIZES | FAMILIES[family])
    model = models.random_model(config, seed=0, quantization=format, **options)
    attach_adapter(model, AdapterConfig(r=4), 0)
    return model


def made_dense(model):
    """The same model with the dense values of its kernels."""
    for layer in kernels(model).values():
        layer.kernel.set_value(dense(layer.kernel.get_value(), jnp.float32))
    return model


def batch(rows=8, length=16):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 96, (rows, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return Batch(
        tokens, np.roll(tokens, -1, axis=1), np.ones(tokens.shape, np.float32), positions, np.ones_like(tokens)
    )


def gradient(model, mesh=None):
    graphdef, trainable, frozen = divide(model)
    # Both halves of each adapter away from where they start, so that either has a gradient.
    trainable = jax.tree.map(lambda x: x + 0.005 * jnp.cos(jnp.arange(x.size * 1.0)).reshape(x.shape), trainable)

    def total(trainable, frozen, rows):
        return sft_loss(nnx.merge(graphdef, trainable, frozen), rows, None).total

    compute = jax.value_and_grad(total)
    if mesh is None:
        return jax.jit(compute)(trainable, frozen, batch())
    trainable, frozen = mesh.shard((trainable, frozen), storage_dims_of(model))
    given = trainable, frozen, jax.device_put(batch(), mesh.batch_sharding())
    return jax.jit(mesh.bind(compute))(*given)


def assert_alike(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("format", [pytest.param("nf4", marks=pytest.mark.slow), *sorted(set(FORMATS) - {"nf4"})])
def test_loss_and_gradients_are_those_of_the_dense_kernels(format):
    remat = "full" if format in ("nf4-dq", "int8") else "none"  # nf4 and int4 come back as these do
    assert_alike(gradient(model_of("llama", format, remat=remat)), gradient(made_dense(model_of("llama", format))))


@pytest.mark.parametrize("format", ["nf4-dq", "int8"])
def test_experts_too(format):
    assert_alike(gradient(model_of("mixtral", format)), gradient(made_dense(model_of("mixtral", format))))


@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("llama", {"fsdp": 4, "tensor": 2}),
        pytest.param("llama", {"fsdp": 1, "tensor": 4, "context": 2}, marks=pytest.mark.slow),
        ("mixtral", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_one_device_is_eight(family, axes):
    mesh = make_mesh_plan(MeshConfig(**axes))
    assert_alike(gradient(model_of(family, "nf4-dq"), mesh), gradient(model_of(family, "nf4-dq")))


def test_codes_and_scales_lie_like_their_kernel():
    mesh = make_mesh_plan(MeshConfig(fsdp=4, tensor=2))
    models = [model_of("llama", format) for format in (None, "nf4-dq")]
    plain, coded = (mesh.shardings(nnx.state(model), storage_dims_of(model)) for model in models)
    for name in ("q_proj", "o_proj"):
        wanted = plain["layers"][0]["self_attn"][name]["kernel"].get_value().spec
        value = coded["layers"][0]["self_attn"][name]["kernel"].get_value()
        assert value.codes.spec == value.scales.codes.spec == wanted


def test_codes_travel_and_not_what_they_mean():
    """Of a step split over fsdp, everything gathered with the size of a kernel is whole numbers."""
    mesh = make_mesh_plan(MeshConfig(fsdp=8))
    model = model_of("llama", "nf4", remat="full")
    graphdef, trainable, frozen = divide(model)

    def total(trainable, frozen, rows):
        return sft_loss(nnx.merge(graphdef, trainable, frozen), rows, None).total

    trainable, frozen = mesh.shard((trainable, frozen), storage_dims_of(model))
    given = trainable, frozen, jax.device_put(batch(), mesh.batch_sharding())
    text = jax.jit(mesh.bind(jax.grad(total))).lower(*given).compile().as_text()
    gathered = [array for array, _ in collectives(parse(text), "all-gather", 8)]
    # Seven kernels forward and seven backward, in one body of a loop each.
    assert sum(array.dtype == "u8" for array in gathered) >= 14
    kernels = ((256, 512), (512, 256))
    assert not [array for array in gathered if array.dtype in ("f32", "bf16") and array.dims[-2:] in kernels]


def test_the_backward_pass_keeps_codes_alone():
    layer = Linear(256, 512, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.kernel.set_value(FORMATS["nf4"].quantize(layer.kernel.get_value()))
    _, pull = jax.vjp(layer, jnp.ones((4, 256)))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(layer.kernel.get_value()))
    assert stored <= kept < 1.2 * stored


def test_the_head_stays_dense_and_everything_else_does_not():
    model = model_of("mixtral", "int8")
    assert has_quantized_kernels(model) and not has_quantized_kernels(model_of("mixtral"))
    assert not isinstance(model.lm_head.kernel.get_value(), QuantizedArray)
    assert all(isinstance(layer.kernel.get_value(), QuantizedArray) for layer in kernels(model).values())


def test_inputs_that_do_not_divide_into_blocks_are_named():
    config = models.config_from_hf(SIZES | FAMILIES["llama"] | {"intermediate_size": 96})
    with pytest.raises(ModelError, match=r"blocks of 64 inputs.*down_proj has 96.*Use int8"):
        models.random_model(config, seed=0, quantization="nf4")
    assert has_quantized_kernels(models.random_model(config, seed=0, quantization="int8"))
