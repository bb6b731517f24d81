"""What the families with experts refuse, what they take, and where their parts lie in files and on devices."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft import models
from jaxft.adapters.attach import attach
from jaxft.adapters.lora import LoRASettings, lora_factory
from jaxft.assets import ASSETS
from jaxft.checkpoint.hf import hf_shape, param_tensors, read_blocks
from jaxft.checkpoint.load import shardings_by_path
from jaxft.checkpoint.tensors import TensorSpec
from jaxft.config import MeshConfig
from jaxft.errors import ConfigError, ModelError
from jaxft.hardware.sizes import sizes_of
from jaxft.models.tensor_map import tensor_names
from jaxft.nn.storage import storage_dims_of
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.trees import flatten

PUBLISHED = ASSETS / "published"
MIXTRAL, QWEN = (
    json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8")) for name in ("mixtral-8x7b", "qwen3-30b-a3b")
)
SMALL = MIXTRAL | {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("hf", "change", "message"),
    [
        (MIXTRAL, {"router_jitter_noise": 0.1}, r"router_jitter_noise=0\.1 \(only 0\.0 is implemented\)"),
        (MIXTRAL, {"num_experts_per_tok": 9}, r"num_experts_per_tok=9 of 8 experts"),
        (MIXTRAL, {"num_experts_per_tok": 0}, r"num_experts_per_tok=0 of 8 experts"),
        (MIXTRAL, {"sliding_window": 0}, r"sliding_window=0"),
        (QWEN, {"router_jitter_noise": 0.1}, r"router_jitter_noise=0\.1"),
        (QWEN, {"decoder_sparse_step": 0}, r"decoder_sparse_step=0"),
        (QWEN, {"mlp_only_layers": [-1]}, r"mlp_only_layers=\[-1\]"),
        (
            QWEN,
            {"num_local_experts": 64},
            r"num_experts=128 and num_local_experts=64 must be equal",
        ),
        (QWEN, {"num_experts": 4}, r"num_experts_per_tok=8 of 4 experts"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(hf, change, message):
    with pytest.raises(ModelError, match=message):
        models.config_from_hf(hf | change)


@pytest.mark.parametrize(
    ("change", "dense"),
    [
        ({"decoder_sparse_step": 2}, [0, 2, 4, 6]),
        ({"mlp_only_layers": [0, 3]}, [0, 3]),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2, 99]}, [0, 1, 2, 3, 4, 6, 7]),
    ],
)
def test_layers_without_experts(change, dense):
    config = models.config_from_hf(QWEN | {"num_hidden_layers": 8} | change)
    names = tensor_names(config.tensors(), 8)
    for i in range(8):
        assert (f"model.layers.{i}.mlp.up_proj.weight" in names) == (i in dense)
        assert (f"model.layers.{i}.mlp.gate.weight" in names) == (i not in dense)
    sizes = sizes_of(models.abstract_model(config))
    whole = sizes_of(models.abstract_model(dataclasses.replace(config, decoder_sparse_step=1, mlp_only_layers=())))
    assert sizes.experts.layers == 8 - len(dense)
    assert sizes.experts.parameters == whole.experts.parameters // 8 * (8 - len(dense))
    # A token passes 8 of 128 experts of 768 units, or one feed-forward of 6144: the same, but for the router.
    assert whole.active - sizes.active == len(dense) * 128 * config.hidden_size


def test_both_names_of_the_number_of_experts_are_read():
    five = {k: v for k, v in QWEN.items() if k != "num_experts"} | {"num_local_experts": 128}
    assert models.config_from_hf(five) == models.config_from_hf(QWEN)


@pytest.mark.parametrize(("kind", "hf"), [("mixtral", MIXTRAL), ("qwen3_moe", QWEN)])
def test_what_is_absent_has_transformers_default(kind, hf):
    transformers = pytest.importorskip("transformers")
    required = {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type",
    }  # fmt: skip
    bare = {k: v for k, v in hf.items() if k in required}
    theirs = transformers.AutoConfig.for_model(**bare).to_dict()
    assert models.config_from_hf(bare) == models.config_from_hf(theirs)


@pytest.mark.parametrize(
    ("mesh", "expert", "rest", "dense"),
    [
        (MeshConfig(fsdp=8), None, "fsdp", "fsdp"),
        (MeshConfig(expert=4), "expert", "fsdp", ("fsdp", "expert")),
        (MeshConfig(expert=2, context=2, tensor=1), "expert", ("fsdp", "context"), ("fsdp", "expert", "context")),
    ],
)
def test_experts_are_split_along_their_axis_and_the_model_dimension(mesh, expert, rest, dense):
    model = models.abstract_model(models.config_from_hf(MIXTRAL))
    specs = {path: sharding.spec for path, sharding in shardings_by_path(model, make_mesh_plan(mesh)).items()}
    assert specs["layers/0/mlp/gate_proj/kernel"] == P(None, expert, rest)
    assert specs["layers/0/mlp/up_proj/kernel"] == P(None, expert, rest)
    assert specs["layers/0/mlp/down_proj/kernel"] == P(None, expert, None, rest)
    assert specs["layers/0/mlp/router/kernel"] == P(None, dense)
    assert specs["layers/0/self_attn/q_proj/kernel"] == P(None, dense)


def test_experts_that_do_not_divide_are_refused():
    model = models.abstract_model(models.config_from_hf(MIXTRAL | {"num_local_experts": 6}))
    with pytest.raises(ConfigError, match=r"expert=4 does not divide dimension 1 = 6(.|\n)*one of 1, 2:"):
        shardings_by_path(model, make_mesh_plan(MeshConfig(expert=4)))


def test_all_linear_leaves_experts_and_router_alone():
    model = models.random_model(models.config_from_hf(SMALL), seed=0)

    make = lora_factory(LoRASettings(r=2, alpha=4.0))

    names = [f"layers/0/self_attn/{name}_proj" for name in "koqv"]
    assert list(attach(model, ["all-linear"], make, jax.random.key(0))) == names
    with pytest.raises(ModelError, match=r"'gate_proj' matches no layer"):
        attach(model, ["gate_proj"], make, jax.random.key(0))


class Numbered:
    """A source whose tensors are random, and that remembers which were read."""

    def __init__(self, model):
        leaves, rng = flatten(nnx.state(model))[0], np.random.default_rng(0)
        self.tensors = {
            piece.hf: rng.normal(size=hf_shape(placed, piece, leaves[path].shape)).astype(np.float32)
            for path, placed in param_tensors(model).items()
            for piece in placed.pieces
        }
        self.names = []

    def specs(self):
        return {name: TensorSpec(array.shape, array.dtype) for name, array in self.tensors.items()}

    def read(self, name, index=None):
        self.names.append(name)
        return self.tensors[name][index or ()]


def test_a_part_of_the_experts_reads_those_experts_only():
    model = models.abstract_model(models.config_from_hf(SMALL))
    source, path = Numbered(model), "layers/0/mlp/down_proj/kernel"
    cut = ((1, 3), (2, 4), (0, 48), (8, 16))
    block = read_blocks(param_tensors(model)[path], source, np.dtype(np.float32), [cut])[cut]
    names = [f"model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight" for i in (1, 2) for e in (2, 3)]
    assert source.names == names
    expected = np.stack([source.tensors[name].T[:, 8:16] for name in names]).reshape(block.shape)
    np.testing.assert_array_equal(block, expected)


@pytest.fixture(scope="module")
def wide():
    """Weights so wide that every choice of an expert shows."""
    return models.random_model(models.config_from_hf(SMALL | {"initializer_range": 0.3}), seed=0)


def test_packed_documents_and_padding_change_nothing(wide):
    tokens = np.random.default_rng(0).integers(1, 96, (2, 12))
    segments = np.array([[1] * 5 + [2] * 7, [1] * 4 + [0] * 8])
    positions = np.array([[*range(5), *range(7)], [*range(4)] + [0] * 8])
    packed, _ = wide(*map(jnp.asarray, (tokens, positions, segments)))
    for row, part in ((0, slice(0, 5)), (0, slice(5, 12)), (1, slice(0, 4))):
        alone, _ = wide(jnp.asarray(tokens[row : row + 1, part]))
        np.testing.assert_allclose(packed[row, part], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_gradients_on_eight_devices_are_those_on_one(wide, remat):
    plan = make_mesh_plan(MeshConfig(fsdp=8))
    abstract = models.abstract_model(wide.config, remat=remat)
    graphdef, state = nnx.split(abstract)[0], nnx.split(wide)[1]
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 96, (8, 12)))

    def loss(state, tokens):
        model = nnx.merge(graphdef, state)
        return jnp.square(model.unembed(model(tokens)[0])).mean()

    split = jax.device_put(state, plan.shardings(state, storage_dims_of(wide)))
    rows = jax.device_put(tokens, NamedSharding(plan.mesh, P("fsdp")))
    grads, wanted = (flatten(jax.jit(jax.grad(loss))(*given))[0] for given in ((split, rows), (state, tokens)))
    for path in wanted:
        scale = np.abs(wanted[path]).max()
        np.testing.assert_allclose(grads[path], wanted[path], rtol=0, atol=1e-4 * scale, err_msg=path)
