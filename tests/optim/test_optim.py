"""AdamW, clipping and schedules against torch and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxft import models
from jaxft.config import AdamWConfig, OptimConfig
from jaxft.errors import ConfigError
from jaxft.optim.make import clip, decay_mask, make_optimizer, make_schedule
from jaxft.trees import flatten

STEPS = 40


def curve(**settings):
    schedule = make_schedule(OptimConfig(**settings), STEPS)
    return np.array([float(schedule(jnp.int32(step))) for step in range(STEPS)])


@pytest.mark.parametrize(
    ("schedule", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_schedules_are_those_of_transformers_one_warm_up_step_ahead(schedule, theirs, warmup):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS)
    expected = []
    for _ in range(STEPS):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = curve(schedule=schedule, learning_rate=3e-4, warmup_steps=warmup)
    # theirs is 0 at step 0 and the peak at step `warmup`; ours is the peak already at the last step of warm-up.
    np.testing.assert_allclose(ours[:warmup], expected[1 : warmup + 1], rtol=1e-5, atol=1e-10)
    np.testing.assert_allclose(ours[warmup:], expected[warmup:], rtol=1e-5, atol=1e-10)


def test_warm_up_moves_from_the_first_step_and_ends_at_the_peak():
    rates = curve(learning_rate=1e-3, schedule="constant", warmup_steps=4)
    np.testing.assert_allclose(rates[:6], [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3], rtol=1e-6)
    np.testing.assert_allclose(curve(warmup_ratio=0.1), curve(warmup_steps=4))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_end_at_the_floor(schedule):
    end = make_schedule(OptimConfig(schedule=schedule, learning_rate=1.0, min_ratio=0.1, warmup_steps=5), STEPS)
    assert float(end(STEPS)) == pytest.approx(0.1)
    assert 0.1 < float(end(STEPS - 1)) < 0.15


@pytest.mark.parametrize("settings", [{"warmup_steps": 40}, {"warmup_steps": 100}, {"warmup_ratio": 0.99}])
def test_a_warm_up_that_leaves_no_step_is_refused(settings):
    with pytest.raises(ConfigError, match="warm-up of .* steps leaves nothing of a run of 40"):
        make_schedule(OptimConfig(**settings), STEPS)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_adamw_equals_torch(clip_norm):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = {
        "a": {"kernel": rng.normal(size=(6, 4))},
        "b": {"kernel": rng.normal(size=(3, 5)), "bias": rng.normal(size=5)},
    }
    start = jax.tree.map(np.float32, start)
    grads = [jax.tree.map(lambda x, s=s: np.float32(rng.normal(size=x.shape) * 10.0**-s), start) for s in range(5)]
    config = OptimConfig(
        learning_rate=1e-2,
        schedule="linear",
        warmup_steps=2,
        weight_decay=0.1,
        adamw=AdamWConfig(b2=0.95),
        clip_norm=clip_norm,
    )
    schedule = make_schedule(config, 5)
    tx = make_optimizer(config, schedule)
    ours = jax.tree.map(jnp.asarray, start)
    state = tx.init(ours)
    update = jax.jit(tx.update)

    theirs = {path: torch.nn.Parameter(torch.tensor(x)) for path, x in flatten(start)[0].items()}
    groups = [
        {"params": [p for path, p in theirs.items() if not path.endswith("bias")], "weight_decay": 0.1},
        {"params": [p for path, p in theirs.items() if path.endswith("bias")], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    for step, grad in enumerate(grads):
        updates, state = update(grad, state, ours)
        ours = optax.apply_updates(ours, updates)
        for path, value in flatten(grad)[0].items():
            theirs[path].grad = torch.tensor(value)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        optimizer.step()
        for path, value in flatten(ours)[0].items():
            np.testing.assert_allclose(
                value, theirs[path].detach().numpy(), rtol=0, atol=1e-6, err_msg=f"{step} {path}"
            )


def test_clipping_keeps_the_direction_and_leaves_small_gradients_alone():
    grads, tx = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}, clip(1.0)
    clipped, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(clipped["a"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [0.8], rtol=1e-6)
    small = jax.tree.map(lambda g: 0.1 * g, grads)
    jax.tree.map(np.testing.assert_array_equal, tx.update(small, tx.init(small))[0], small)


def test_weight_decay_moves_matrices_and_leaves_norms_and_biases(smoke_config):
    config = models.config_from_hf(smoke_config | {"attention_bias": True, "mlp_bias": True})
    params = nnx.state(models.random_model(config, seed=0))
    params = jax.tree.map(lambda x: x + 1.0, params)
    assert jax.tree.structure(decay_mask(params)) == jax.tree.structure(params)
    optim = OptimConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5)
    tx = make_optimizer(optim, make_schedule(optim, 10))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    before, after = flatten(params)[0], flatten(optax.apply_updates(params, updates))[0]
    kept = {path for path in before if path.rsplit("/", 1)[-1] in ("scale", "bias")}
    assert len(kept) == 10
    for path, value in before.items():
        expected = value if path in kept else 0.95 * value
        np.testing.assert_allclose(after[path], expected, rtol=1e-6, err_msg=path)
