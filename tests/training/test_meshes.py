"""One device = eight, for every mesh axis and products of them: losses, gradients and what moves, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.adapters.attach import AdapterParam
from jaxft.assets import ASSETS
from jaxft.checkpoint.hf import read_json
from jaxft.config import AdapterConfig, MeshConfig
from jaxft.data.batch import Batch
from jaxft.nn.storage import storage_dims_of
from jaxft.objectives import vocabulary
from jaxft.objectives.sft import sft_loss
from jaxft.runs.build import attach_adapter
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.training.state import divide

MESHES = {
    "fsdp": {"fsdp": 8},
    "data": {"data": 8, "fsdp": 1},
    "slice": {"slice": 2, "fsdp": 4},
    "expert": {"expert": 4, "fsdp": 2},
    "tensor": {"tensor": 8, "fsdp": 1},
    "context": {"context": 8, "fsdp": 1},
    "data, fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp, context": {"fsdp": 2, "context": 4},
    "context, tensor": {"fsdp": 1, "context": 2, "tensor": 4},
    "fsdp, tensor": {"fsdp": 2, "tensor": 4},
}
ALONE = [(axis, "lora") for axis in ("fsdp", "data", "expert", "context")]
# The vocabulary is split over all devices, over the tensor axis only, and, 61 being prime, not at all.
VOCABULARIES = {"narrow": 64, "wide": 2048, "odd": 61}
SLOW = [("lora", "narrow"), ("lora", "odd")]
ADAPTERS = {
    "full": AdapterConfig(kind="none"),
    "lora": AdapterConfig(r=4, target_modules="all-linear,lm_head"),
}
# As if trained a little, on two meshes: the other forms of LoRA, and modules trained whole.
FORMS = {
    "dora": AdapterConfig(
        r=4, alpha=4.0, target_modules="all-linear,lm_head", use_dora=True, init_lora_weights="olora"
    ),
    "embeddings": AdapterConfig(
        r=4, target_modules="embed_tokens,q_proj,down_proj", rank_pattern="layers.0.self_attn.q_proj:2",
        modules_to_save="lm_head,norm",
    ),
}  # fmt: skip


@functools.cache
def module_of(vocab, kind):
    hf = read_json(str(ASSETS / "smoke" / "config.json"))
    sizes = {"vocab_size": vocab, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
    head = {"tie_word_embeddings": kind == "full"}
    module = models.random_model(models.config_from_hf(hf | sizes | heads | head), seed=0)
    attach_adapter(module, (ADAPTERS | FORMS)[kind], 0)
    if kind in FORMS:
        state = nnx.state(module, AdapterParam)
        nnx.update(module, jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(0), x.shape), state))
    return module


def packed_batch(vocab, rows=8, length=16):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    segments = np.sort(rng.integers(0, 4, (rows, length)), axis=1).astype(np.int32)[:, ::-1]
    segments = np.where(segments == 0, 0, segments.max(axis=1, keepdims=True) + 1 - segments)
    starts = np.array([[np.argmax(row == s) for s in row] for row in segments])
    weights = np.where((segments > 0) & (rng.random((rows, length)) < 0.6), 1.0, 0.0).astype(np.float32)
    positions = (np.arange(length) - starts).astype(np.int32)
    return Batch(tokens, np.roll(tokens, -1, axis=1), weights, positions, segments.astype(np.int32))


def loss_and_gradient(vocab, kind, mesh=None):
    module = module_of(vocab, kind)
    graphdef, trainable, frozen = divide(module)
    batch = packed_batch(vocab)

    def total(trainable, frozen, batch):
        sums = sft_loss(nnx.merge(graphdef, trainable, frozen), batch, None)
        return sums.total, sums

    compute = jax.value_and_grad(total, has_aux=True)
    if mesh is None:
        (_, sums), grad = jax.jit(compute)(trainable, frozen, batch)
        return sums, grad
    trainable, frozen = mesh.shard((trainable, frozen), storage_dims_of(module))
    given = trainable, frozen, jax.device_put(batch, mesh.batch_sharding())
    (_, sums), grad = jax.jit(mesh.bind(compute))(*given)
    return sums, grad


@functools.cache
def alone(vocab, kind):
    return loss_and_gradient(vocab, kind)


def assert_same(ours, one):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(one), strict=True):
        size = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5 * max(size, 1e-3))


@pytest.mark.parametrize(
    ("axes", "kind"),
    [
        # Adapters on one axis alone are in the products; the sum over slices is its own.
        pytest.param(axes, kind, id=f"{name}-{kind}", marks=pytest.mark.slow if (name, kind) in ALONE else ())
        for name, axes in MESHES.items()
        for kind in ADAPTERS
    ],
)
def test_eight_devices_equal_one_on_every_axis(axes, kind):
    mesh = make_mesh_plan(MeshConfig(**axes))
    assert_same(loss_and_gradient(64, kind, mesh), alone(64, kind))


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(
    "axes", [MESHES["fsdp, tensor"], MESHES["fsdp, context"]], ids=["fsdp, tensor", "fsdp, context"]
)
def test_other_forms_of_adapters_likewise(axes, kind):
    mesh = make_mesh_plan(MeshConfig(**axes))
    assert_same(loss_and_gradient(64, kind, mesh), alone(64, kind))


@pytest.mark.parametrize(
    ("vocab", "kind"),
    [
        # An adapter on a narrow head is on every mesh above; one on a whole head exchanges less than one on parts.
        pytest.param(vocab, kind, id=f"{kind}-{name}", marks=pytest.mark.slow if (kind, name) in SLOW else ())
        for name, vocab in VOCABULARIES.items()
        for kind in ADAPTERS
    ],
)
def test_however_the_vocabulary_is_split(vocab, kind, monkeypatch):
    # So small that every row is several chunks.
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", {"cpu": 4 * vocab * 8 * 3, "accelerator": 1})
    mesh = make_mesh_plan(MeshConfig(fsdp=2, context=2, tensor=2))
    assert_same(loss_and_gradient(vocab, kind, mesh), loss_and_gradient(vocab, kind))
