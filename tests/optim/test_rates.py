"""Learning rates of LoRA+ and of decay from layer to layer: PEFT's groups, and the factor of every parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import OptimConfig, SGDConfig
from jaxft.nn.stack import group_layers, layout
from jaxft.optim.make import make_optimizer
from jaxft.optim.rates import scale_by_parameter
from jaxft.trees import flatten

SHAPES = {
    "layers/0/self_attn/q_proj/adapter/lora_a": (2, 4, 16),
    "layers/0/self_attn/q_proj/adapter/lora_b": (2, 4, 24),
    "layers/0/self_attn/q_proj/adapter/magnitude": (2, 24),
}


def moved(config, params, stacks=()):
    """How far a step of constant gradient moves each parameter: with sgd, its own learning rate."""
    tx = make_optimizer(config, lambda step: config.learning_rate, stacks=stacks)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    return {path: -np.asarray(x) for path, x in flatten(updates)[0].items()}


def sgd(**fields):
    return OptimConfig(name="sgd", sgd=SGDConfig(momentum=0.0), learning_rate=0.5, clip_norm=None, **fields)


def test_loraplus_rates_are_those_of_peft():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 16))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], use_dora=True))
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=16.0)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            rates[next(kind for kind in ("lora_A", "lora_B", "magnitude") if kind in names[id(p)])] = group["lr"]
    params = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    ours = moved(sgd(loraplus_lr_ratio=16.0), params)
    for path, step in ours.items():
        kind = {"lora_a": "lora_A", "lora_b": "lora_B"}.get(path.rsplit("/", 1)[-1], "magnitude")
        np.testing.assert_allclose(step, rates[kind])


def test_layers_decay_from_the_head_down_along_their_stacks():
    # Layer 0 alone, then groups of layers 1, 3, 5 and 2, 4, 6.
    stacks = group_layers(layout(["local", "global"] * 3 + ["local"]))
    assert stacks == ((0,), (1, 3, 5), (2, 4, 6))
    params = {"embed_tokens": {"embedding": jnp.zeros((5, 4))}, "norm": {"scale": jnp.zeros(4)}, "layers": {}}
    for group, layers in enumerate(stacks):
        kinds = {"kernel": jnp.zeros((len(layers), 4, 3)), "bias": jnp.zeros((len(layers), 3))}
        params["layers"][str(group)] = {"q_proj": kinds}
    params["lm_head"] = {"kernel": jnp.zeros((4, 5))}
    ours = moved(sgd(layer_decay=0.5), params, stacks)
    np.testing.assert_allclose(ours["lm_head/kernel"], 0.5)
    np.testing.assert_allclose(ours["norm/scale"], 0.5)
    np.testing.assert_allclose(ours["embed_tokens/embedding"], 0.5 * 0.5**8)
    for group, layers in enumerate(stacks):
        for place, layer in enumerate(layers):
            for kind in ("kernel", "bias"):
                np.testing.assert_allclose(ours[f"layers/{group}/q_proj/{kind}"][place], 0.5 * 0.5 ** (7 - layer))


def test_decay_of_weights_goes_by_the_own_rate_as_in_torch_s_groups():
    params = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    tx = make_optimizer(
        OptimConfig(name="adamw", weight_decay=0.1, loraplus_lr_ratio=4.0, clip_norm=None), lambda step: 0.5
    )
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    steps = {path.rsplit("/", 1)[-1]: float(jnp.max(x)) for path, x in flatten(updates)[0].items()}
    assert steps == pytest.approx({"lora_a": -0.05, "lora_b": -0.2, "magnitude": 0.0})


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor", "lion", "muon", "schedule_free_adamw"])
def test_every_optimizer_has_them(name):
    params = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    plain, ratio = (
        moved(OptimConfig(name=name, clip_norm=None, loraplus_lr_ratio=ratio), params) for ratio in (None, 8.0)
    )
    for path, step in plain.items():
        factor = 1.0 if path.endswith("lora_a") else 8.0
        np.testing.assert_allclose(ratio[path], factor * step, rtol=2e-4)


def test_both_multiply():
    tx = scale_by_parameter(loraplus_lr_ratio=3.0, layer_decay=0.5, stacks=[(0, 1)])
    grads = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    updates, _ = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose(updates["layers/0/self_attn/q_proj/adapter/lora_b"][:, 0, 0], [0.75, 1.5])
