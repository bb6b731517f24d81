"""Every optimizer against its own reference, several steps in float32, layer by layer of a stack."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.config import AdafactorConfig, MuonConfig, OptimConfig, ScheduleFreeConfig, SGDConfig
from jaxft.optim.averages import evaluation_params
from jaxft.optim.make import make_optimizer, make_schedule
from jaxft.trees import flatten

LAYERS, INPUTS, OUTPUTS, WIDTH = 2, 24, 40, 16
STEPS = 6
SHAPES = {
    "embed_tokens/embedding": (11, INPUTS),
    "layers/0/mlp/up_proj/kernel": (LAYERS, INPUTS, OUTPUTS),
    "layers/0/mlp/up_proj/bias": (LAYERS, OUTPUTS),
    "layers/0/norm/scale": (LAYERS, INPUTS),
    "layers/0/self_attn/q_proj/adapter/lora_a": (LAYERS, 4, INPUTS),
    "lm_head/kernel": (INPUTS, 11),
}


def nested(flat):
    out = {}
    for path, value in flat.items():
        *sections, name = path.split("/")
        node = out
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return out


def drawn(shapes=SHAPES, steps=STEPS):
    rng = np.random.default_rng(0)
    start = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    # Of unlike sizes from layer to layer and step to step, so that nothing may be shared between them.
    sizes = 10.0 ** rng.integers(-3, 2, (steps, LAYERS))
    grads = []
    for step in range(steps):
        grad = {path: rng.normal(size=shape) for path, shape in shapes.items()}
        for path, g in grad.items():
            size = sizes[step].reshape(-1, *(1,) * (g.ndim - 1)) if path.startswith("layers") else sizes[step, 0]
            grad[path] = np.float32(g * size)
        grads.append(grad)
    return start, grads


def run(config, start, grads, schedule=None, **options):
    """Parameters after every step, by path, and the last state."""
    schedule = schedule or make_schedule(config, len(grads))
    tx = make_optimizer(config, schedule, **options)
    params = jax.tree.map(jnp.asarray, nested(start))
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for grad in grads:
        updates, state = update(nested(grad), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(flatten(params)[0])
    return seen, state


def torch_parameters(torch, start):
    """path -> its parameters, one for each layer."""
    return {
        path: [torch.nn.Parameter(torch.tensor(x)) for x in (value if path.startswith("layers") else [value])]
        for path, value in start.items()
    }


def is_vector(path):
    return path.endswith(("bias", "scale"))


def run_torch(torch, start, grads, make, schedule):
    """The same with optimizers of torch: make(vectors, matrices) -> optimizers."""
    theirs = torch_parameters(torch, start)
    pick = lambda wanted: [p for path, ps in theirs.items() if is_vector(path) == wanted for p in ps]  # noqa: E731
    optimizers, seen = make(pick(True), pick(False)), []
    for step, grad in enumerate(grads):
        for path, parameters in theirs.items():
            for index, p in enumerate(parameters):
                p.grad = torch.tensor(grad[path][index] if path.startswith("layers") else grad[path])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = float(schedule(step))
            optimizer.step()
        seen.append({path: np.stack([p.detach().numpy() for p in ps]) for path, ps in theirs.items()})
    return seen


def assert_close(ours, theirs, atol=1e-6):
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for path, value in a.items():
            np.testing.assert_allclose(
                value, b[path].reshape(value.shape), rtol=1e-5, atol=atol, err_msg=f"{step} {path}"
            )


def compared(torch, config, make, atol=1e-6):
    start, grads = drawn()
    schedule = make_schedule(config, STEPS)
    ours, _ = run(config, start, grads)
    assert_close(ours, run_torch(torch, start, grads, make, schedule), atol)


def config_of(name, **fields):
    return OptimConfig(
        name=name, learning_rate=1e-2, schedule="linear", warmup_steps=2, clip_norm=None, weight_decay=0.1, **fields
    )


def test_sgd_is_torch_s():
    torch = pytest.importorskip("torch")
    start, grads = drawn()
    config = OptimConfig(
        name="sgd",
        learning_rate=1e-2,
        schedule="linear",
        clip_norm=None,
        weight_decay=0.1,
        sgd=SGDConfig(momentum=0.8),
    )

    def make(vectors, matrices):
        groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.1}]
        return [torch.optim.SGD(groups, momentum=0.8)]

    ours, _ = run(config, start, grads)
    assert_close(ours, run_torch(torch, start, grads, make, make_schedule(config, STEPS)), 1e-5)


def test_lion_is_bitsandbytes():
    torch = pytest.importorskip("torch")
    bnb = pytest.importorskip("bitsandbytes")

    def make(vectors, matrices):
        kinds = ((vectors, 0.0), (matrices, 0.1))
        return [bnb.optim.Lion32bit(group, betas=(0.9, 0.99), weight_decay=decay) for group, decay in kinds]

    compared(torch, config_of("lion"), make)


def test_adafactor_is_torch_s():
    torch = pytest.importorskip("torch")

    def make(vectors, matrices):
        # Its steps are at most 1 / sqrt(t), which 1e-2 stays below.
        return [torch.optim.Adafactor(vectors), torch.optim.Adafactor(matrices, weight_decay=0.1)]

    compared(torch, config_of("adafactor", adafactor=AdafactorConfig(scale_parameter=True)), make)


@pytest.mark.parametrize("scale_parameter", [False, True])
def test_adafactor_is_that_of_transformers(scale_parameter):
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("transformers.optimization")
    options = {"scale_parameter": scale_parameter, "relative_step": False, "warmup_init": False}

    def make(vectors, matrices):
        return [
            optimization.Adafactor(vectors, lr=1.0, **options),
            # Its decay goes by the scaled step, ours by the learning rate: the same where nothing is scaled.
            optimization.Adafactor(matrices, lr=1.0, weight_decay=0.0 if scale_parameter else 0.1, **options),
        ]

    config = OptimConfig(
        name="adafactor", learning_rate=1e-2, schedule="linear", clip_norm=None,
        adafactor=AdafactorConfig(scale_parameter=scale_parameter), weight_decay=0.0 if scale_parameter else 0.1,
    )  # fmt: skip
    compared(torch, config, make)


def test_muon_is_torch_s_for_hidden_matrices_and_adamw_for_others(monkeypatch):
    torch = pytest.importorskip("torch")
    # torch iterates in bfloat16; in float32 the two can be compared.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    outer = ("embed_tokens/embedding", "lm_head/kernel")

    def make(vectors, matrices):
        hidden = [p for p in matrices if 11 not in p.shape]
        assert len(matrices) - len(hidden) == len(outer)
        rest = [p for p in matrices if 11 in p.shape]
        return [
            torch.optim.Muon(hidden, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [{"params": vectors, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.1}], betas=(0.8, 0.95)
            ),
        ]

    compared(torch, config_of("muon", muon=MuonConfig(momentum=0.9, b1=0.8, b2=0.95)), make, atol=1e-5)


@pytest.mark.parametrize("warmup", [0, 3])
def test_schedule_free_is_its_authors(warmup):
    torch = pytest.importorskip("torch")
    schedulefree = pytest.importorskip("schedulefree")
    start, grads = drawn()
    config = OptimConfig(
        name="schedule_free_adamw", learning_rate=1e-2, schedule="constant", warmup_steps=warmup, clip_norm=None,
        weight_decay=0.1, schedule_free_adamw=ScheduleFreeConfig(b1=0.95),
    )  # fmt: skip
    theirs = torch_parameters(torch, start)
    optimizers = [
        schedulefree.AdamWScheduleFree(
            [p for path, ps in theirs.items() if is_vector(path) == vector for p in ps],
            lr=1e-2, betas=(0.95, 0.999), weight_decay=0.0 if vector else 0.1, warmup_steps=warmup,
        )
        for vector in (True, False)
    ]  # fmt: skip
    ours, state = run(config, start, grads)
    for optimizer in optimizers:
        optimizer.train()
    for step, grad in enumerate(grads):
        for path, parameters in theirs.items():
            for index, p in enumerate(parameters):
                p.grad = torch.tensor(grad[path][index] if path.startswith("layers") else grad[path])
        for optimizer in optimizers:
            optimizer.step()
        trained = {path: np.stack([p.detach().numpy() for p in ps]) for path, ps in theirs.items()}
        assert_close([ours[step]], [trained])
    for optimizer in optimizers:
        optimizer.eval()
    averaged = {path: np.stack([p.detach().numpy() for p in ps]) for path, ps in theirs.items()}
    mine = flatten(evaluation_params(state, nested(ours[-1])))[0]
    assert_close([mine], [averaged])
    assert max(np.abs(mine[path] - ours[-1][path]).max() for path in mine) > 1e-3


@pytest.mark.parametrize("name", ["lion", "sgd", "muon", "apollo"])
def test_moments_in_bfloat16_follow_those_in_float32(name):
    start, grads = drawn()
    kinds = {"weight_decay": 0.0, "schedule": "constant", "learning_rate": 1e-3, "clip_norm": 1.0}
    plain, _ = run(OptimConfig(name=name, **kinds), start, grads)
    config = OptimConfig(name=name, **kinds)
    moments = dataclasses.replace(getattr(config, name), moments_dtype="bfloat16")
    half, state = run(dataclasses.replace(config, **{name: moments}), start, grads)
    sizes = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert sizes == {jnp.dtype("bfloat16")}
    if name != "lion":  # whose sign turns where a sum is nearly nothing
        for path, value in plain[-1].items():
            moved = np.abs(value - start[path]).max()
            np.testing.assert_allclose(half[-1][path], value, rtol=0, atol=0.05 * moved, err_msg=path)
