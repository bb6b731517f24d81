"""Training a part of the model: its gradient is that part of the whole one, and nothing is kept for the rest."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from test_meshes import packed_batch

from jaxft import models
from jaxft.assets import ASSETS
from jaxft.checkpoint.hf import param_tensors, read_json
from jaxft.checkpoint.load import load_model
from jaxft.config import MeshConfig, OptimConfig, resolve
from jaxft.hardware.topology import parse
from jaxft.nn.storage import storage_dims_of
from jaxft.objectives.sft import sft_loss
from jaxft.optim.make import make_optimizer, make_schedule
from jaxft.planning.job import abstract_step_of, sharded_step_of
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.training.state import create, divide
from jaxft.training.step import make_train_step
from jaxft.trees import flatten

PART = "layers.1-2.mlp,norm,layers.2.self_attn.q_proj"


def gradient(module, mesh=None):
    """Gradients by Hugging Face's names of the tensors."""
    graphdef, trainable, frozen = divide(module)
    batch = packed_batch(96)

    def total(trainable, frozen, batch):
        return sft_loss(nnx.merge(graphdef, trainable, frozen), batch, None).total

    if mesh is not None:
        trainable, frozen = mesh.shard((trainable, frozen), storage_dims_of(module))
        batch = jax.device_put(batch, mesh.batch_sharding())
    compute = jax.jit(jax.grad(total) if mesh is None else mesh.bind(jax.grad(total)))
    grads = flatten(compute(trainable, frozen, batch))[0]
    table = param_tensors(module)
    return {piece.hf: np.asarray(grads[path][piece.at]) for path in grads for piece in table[path].pieces}


def assert_same(ours, expected):
    assert ours
    for name, grad in ours.items():
        size = np.abs(expected[name]).max()
        np.testing.assert_allclose(grad, expected[name], rtol=1e-5, atol=1e-5 * size, err_msg=name)


def test_the_gradient_is_that_part_of_the_whole_one(tiny_llama):
    part = gradient(load_model(tiny_llama("plain"), trainable=PART).module)
    assert len(part) == 2 * 3 + 1 + 1
    assert_same(part, gradient(load_model(tiny_llama("plain")).module))


@pytest.mark.parametrize("axes", [{"fsdp": 2, "context": 2, "tensor": 2}], ids=str)
def test_eight_devices_equal_one(tiny_llama, axes):
    module = load_model(tiny_llama("plain"), trainable=PART).module
    assert_same(gradient(module, make_mesh_plan(MeshConfig(**axes))), gradient(module))


def test_a_step_moves_the_part_and_keeps_moments_of_it_alone(tiny_llama):
    module = load_model(tiny_llama("plain"), param_dtype="bfloat16", trainable=PART).module
    optim = OptimConfig(learning_rate=1e-2, schedule="constant")
    schedule = make_schedule(optim, 10)
    tx = make_optimizer(optim, schedule)
    graphdef, state = create(module, tx, seed=0)
    moved = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == pytest.approx(2 * moved, abs=4)
    before = jax.tree.map(np.asarray, (state.trainable, state.frozen))
    after, metrics = jax.jit(make_train_step(graphdef, sft_loss, tx, schedule))(state, packed_batch(96))
    assert float(metrics["grad_norm"]) > 0
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before[0], after.trainable)), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before[1], after.frozen)), strict=True))


def test_layers_below_the_first_that_moves_take_no_part_in_the_backward_pass(tiny_llama):
    def flops(trainable):
        module = load_model(tiny_llama("plain"), trainable=trainable).module
        graphdef, moving, frozen = divide(module)
        batch = packed_batch(96)

        def total(moving, frozen):
            return sft_loss(nnx.merge(graphdef, moving, frozen), batch, None).total

        text = jax.jit(jax.grad(total)).lower(moving, frozen).as_text()
        return text.count("stablehlo.while")

    # The scan over the layers that move runs twice, the one below it once.
    assert flops("layers.0-2") == flops("layers.2") - 1


def plan(**model):
    config = {
        "model": {"path": "x", "dtype": "bfloat16", "param_dtype": "bfloat16", **model},
        "adapter": {"kind": "none"}, "data": {"train": "y", "max_length": 512}, "train": {"batch_size": 8},
    }  # fmt: skip
    hf = read_json(str(ASSETS / "published" / "llama-3.1-8b.json"))
    config = resolve(config)
    abstract_step = abstract_step_of(config, hf, 10)
    return abstract_step.sizes, sharded_step_of(abstract_step, config, parse("v5e:2x4"), real=False)


def test_a_plan_counts_no_moments_and_fewer_flops_for_what_stands_still():
    sizes, step = plan()
    few, part = plan(trainable="layers.24-31")
    layers = 8 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)
    assert (sizes.trainable, few.trainable) == (sizes.parameters, layers) and few.parameters == sizes.parameters
    assert part.parts().optimizer == pytest.approx(8 * layers / 8, rel=1e-4)
    assert part.parts().weights == pytest.approx((4 * layers + 2 * (few.parameters - layers)) / 8, rel=1e-3)
    head = 4096 * 128256
    matrices, all_matrices = layers - 8 * 2 * 4096, sizes.active - head
    assert (few.trained, few.reached, few.active) == (matrices, matrices + head, sizes.active)
    assert all_matrices == 4 * matrices
    tokens, scores = 8 * 512, 32 * 128 * (512 * 513 // 2)
    expected = 2 * (sizes.active + few.reached + matrices) * tokens + 8 * scores * (4 * 32 + 8 * 8)
    assert part.model_flops == expected // 8 < 0.6 * step.model_flops


def test_routers_that_stand_still_have_no_loss_of_their_own(smoke_config):
    from jaxft.methods.parts.router import router_coefficients

    hf = smoke_config | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    hf = {key: value for key, value in hf.items() if key not in ("attention_bias", "mlp_bias")}
    config = resolve({"model": {"path": "x"}, "adapter": {"kind": "none"}, "data": {"train": "y"}})

    def coefficients(trainable):
        model = models.abstract_model(models.config_from_hf(hf), trainable=trainable)
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, trainable=trainable))
        return router_coefficients(changed, model)

    assert coefficients("self_attn") is None
    assert coefficients(None) is not None and coefficients("block_sparse_moe.gate") is not None
