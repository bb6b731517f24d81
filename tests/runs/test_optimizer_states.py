"""What optimizers keep of large models, without memory: how it is split over meshes, and how many bytes it has."""

import functools
import json
import math

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from jaxft.assets import ASSETS
from jaxft.config import OptimConfig, choices, resolve
from jaxft.nn.storage import storage_dims_of
from jaxft.runs.build import abstract_of, make_tx
from jaxft.sharding.mesh import MeshPlan
from jaxft.sharding.specs import BIG
from jaxft.training.state import create
from jaxft.trees import flatten

OPTIMIZERS = choices(OptimConfig, "name")
MODELS = {"8B": "llama-3.1-8b", "MoE": "mixtral-8x7b"}
MESHES = {
    "fsdp": {"fsdp": 64},
    "fsdp, tensor": {"fsdp": 8, "tensor": 8},
    "expert": {"fsdp": 8, "expert": 4, "context": 2},
}
GIB = 2**30


def plan_of(axes):
    sizes = {name: axes.get(name, 1) for name in ("slice", "data", "fsdp", "expert", "context", "tensor")}
    return MeshPlan(mesh=AbstractMesh(tuple(sizes.values()), tuple(sizes)))


@functools.cache
def state_of(stem, name, adapter="none", r=16, ema_decay=None):
    """(the abstract train state of a run, how its parameters are split)."""
    hf_config = json.loads((ASSETS / "published" / f"{stem}.json").read_text(encoding="utf-8"))
    config = resolve(
        {
            "model": {"path": stem, "dtype": "bfloat16", "param_dtype": "bfloat16"},
            "adapter": {"kind": adapter, "r": r},
            "data": {"train": "x"},
            "optim": {"name": name, "schedule": "constant"},
            "train": {"ema_decay": ema_decay},
        }
    )
    model = abstract_of(hf_config, config)
    tx = make_tx(config, model, lambda step: 1e-4)
    graphdef, parameters = nnx.split(model)
    return jax.eval_shape(lambda p: create(nnx.merge(graphdef, p), tx, 0)[1], parameters), storage_dims_of(model)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_nothing_large_is_whole_on_every_device(model, name, axes):
    if "expert" in axes and model != "MoE":
        pytest.skip("no experts")
    state, dims = state_of(MODELS[model], name)
    shardings = flatten(plan_of(axes).shardings(state, dims))[0]
    shapes = flatten(state)[0]
    whole = {
        path: leaf.shape
        for path, leaf in shapes.items()
        if math.prod(leaf.shape) > BIG and shardings[path].shard_shape(leaf.shape) == leaf.shape
    }
    assert not whole
    # What is shaped like a parameter lies like it.
    kernel = "layers/0/self_attn/k_proj/kernel"
    like = [path for path in shapes if path.startswith("opt_state") and path.endswith(kernel)]
    for path in like:
        assert shapes[path].shape == shapes[f"trainable/{kernel}"].shape
        assert shardings[path].spec == shardings[f"trainable/{kernel}"].spec
    assert like or name in ("adafactor", "apollo")


@pytest.mark.parametrize("axes", [MESHES["fsdp"], MESHES["fsdp, tensor"]], ids=["fsdp", "fsdp, tensor"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "apollo"])
def test_of_adapters_only_scales_may_be_whole(name, axes):
    state, dims = state_of(MODELS["8B"], name, "lora", 64)
    shardings, shapes = flatten(plan_of(axes).shardings(state, dims))[0], flatten(state)[0]
    whole = [
        path
        for path, leaf in shapes.items()
        if math.prod(leaf.shape) > BIG and shardings[path].shard_shape(leaf.shape) == leaf.shape
    ]
    assert all(path.endswith("absmax") for path in whole)
    assert sum(4 * math.prod(shapes[path].shape) for path in whole) < 2**23


def kept(state):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state))


# docs/optimizers.md says these.
BYTES = {
    "adamw": 8.0, "adamw_8bit": 2.42, "adafactor": 0.002, "lion": 4.0, "sgd": 4.0, "muon": 4.52, "apollo": 1.53,
    "schedule_free_adamw": 8.0,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_a_parameter_of_an_8b_model(name):
    assert kept(state_of(MODELS["8B"], name)[0]) / 8_030_261_248 == pytest.approx(BYTES[name], abs=0.005)


def test_an_average_is_one_more_copy():
    plain, averaged = (state_of(MODELS["8B"], "sgd", "lora", ema_decay=decay)[0] for decay in (None, 0.99))
    trained = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plain.trainable))
    assert kept(averaged) == kept(plain) + trained + 4


def test_the_table_names_every_optimizer():
    assert BYTES.keys() == set(OPTIMIZERS)
    assert OptimConfig().name in OPTIMIZERS
