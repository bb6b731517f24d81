"""With `dots` the backward pass of a layer multiplies nothing again, whichever kernel computes its attention."""

import json
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxft import models
from jaxft.assets import ASSETS
from jaxft.nn.attention.layer import Kept, Tokens
from jaxft.nn.attention.rope import rotation
from jaxft.nn.block import Block
from jaxft.nn.stack import REMAT

AXES = ("slice", "data", "fsdp", "expert", "context", "tensor")
# Layers of published models, of which only the sizes are known: the number of the layer and what is special in it.
LAYERS = {
    "llama-3.1-8b": (0, "nothing"),
    "phi-4": (0, "one product for queries, keys and values"),
    "qwen3-8b": (0, "norms of queries and keys"),
    "gemma-3-4b-text": (0, "norms of what each part adds"),
    "gemma-4-12b-text": (5, "values from the product of keys"),
    "gemma-4-e4b-text": (-1, "keys and values of an earlier layer"),
    "qwen3.5-9b-text": (3, "a gate"),
    "deepseek-v2-lite": (0, "latent keys"),
    "deepseek-v3": (0, "latent keys and queries"),
}
PLATFORMS = ("cpu", "gpu", "tpu")
CASES = [
    (name, platform)
    for name in LAYERS
    for platform in (PLATFORMS if name in ("llama-3.1-8b", "qwen3-8b", "deepseek-v2-lite") else ("gpu",))
]
KERNELS = ("pallas_call", "dot_product_attention_fwd_wrapper")  # of TPUs and GPUs
ROWS, LENGTH = 1, 128


def layer_of(name):
    """(an abstract layer, the ropes of its model with the head sizes that they are for)."""
    config = models.config_from_hf(json.loads((ASSETS / "published" / f"{name}.json").read_text()))
    shape = config.shape()
    types = {"stddev": 0.02, "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    block = nnx.eval_shape(lambda: Block(shape.layers[LAYERS[name][0]], **types, rngs=nnx.Rngs(0)))
    return block, list(zip(shape.ropes, shape.rope_dims or (config.head_dim,) * len(shape.ropes), strict=True))


def products(layer, remat, platform):
    """Matrix products and kernels of a layer forward and backward, by the name of their primitive."""
    (block, ropes), positions_BS = layer, jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    graphdef, state = nnx.split(block)
    mesh = AbstractMesh(
        (1,) * len(AXES), AXES, (AxisType.Auto,) * len(AXES),
        abstract_device=AbstractDevice(device_kind="any", num_cores=None, platform=platform),
    )  # fmt: skip

    def run(state, x_BSD, own_BSP, k_BSKH, v_BSKH):
        rotations = tuple(rotation(rope, size, positions_BS) for rope, size in ropes)
        tokens = Tokens(positions_BS, jnp.ones_like(positions_BS), rotations, kept=Kept(k_BSKH, v_BSKH))
        return nnx.merge(graphdef, state).with_kept(x_BSD, tokens, None, jnp.int32(0), None, None, own_BSP)[0]

    def total(*arguments):
        again = run if remat == "none" else jax.checkpoint(run, policy=REMAT[remat])
        return again(*arguments).astype(jnp.float32).sum()

    width, own = block.mixer.shape.width, block.per_layer_input_gate.kernel.shape[1] if block.has_own_input else 1
    heads = (getattr(block.mixer.shape, "kv_heads", 1), getattr(block.mixer.shape, "head_dim", 1))
    sizes = [(ROWS, LENGTH, *size) for size in ((width,), (own,), heads, heads)]
    with jax.sharding.use_abstract_mesh(mesh):
        arguments = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
        return counted(jax.make_jaxpr(jax.grad(total))(state, *arguments).jaxpr)


def counted(jaxpr):
    """Calls without results are left out, as by the compiler; so are rotations, small products that `dots` repeats."""
    counts = Counter()
    for equation in (one for one in jaxpr.eqns if one.outvars):
        name = equation.primitive.name
        if name == "dot_general" or name in KERNELS:
            counts[name] += not is_rotation(equation)
            continue
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                counts += counted(getattr(inner, "jaxpr", inner))
    return counts


def is_rotation(equation):
    """On TPUs a rotation is a product with a square matrix, whose sides are what is rotated of a head."""
    shape = equation.invars[1].aval.shape
    return equation.primitive.name == "dot_general" and len(shape) == 2 and shape[0] == shape[1] <= 256


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.fixture(autouse=True)
def any_cudnn(monkeypatch):
    # JAX asks the machine that it traces on for cuDNN, and there is none here.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize(("name", "platform"), CASES)
def test_no_product_is_recomputed(name, platform):
    layer = layer_of(name)
    assert products(layer, "dots", platform) == products(layer, "none", platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_everything_is_recomputed_with_full(platform):
    layer = layer_of("llama-3.1-8b")
    once, again = products(layer, "none", platform), products(layer, "full", platform)
    assert again["dot_general"] >= once["dot_general"] + 6  # queries, keys, values, output, gate and up
    assert sum(again[kernel] - once[kernel] for kernel in KERNELS) == (0 if platform == "cpu" else 1)
