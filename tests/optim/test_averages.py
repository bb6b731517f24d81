"""The average of weights, and which weights are evaluated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.config import OptimConfig
from jaxft.optim.averages import evaluation_params, with_average
from jaxft.optim.make import make_optimizer

PARAMS = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": {"bias": jnp.ones(2)}}


def run(tx, steps=5):
    """(parameters, state) of every step."""
    params, state, seen = PARAMS, tx.init(PARAMS), []
    for step in range(steps):
        grads = jax.tree.map(functools.partial(jnp.full_like, fill_value=step + 1.0), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params, state))
    return seen


def test_the_average_is_torch_s():
    torch = pytest.importorskip("torch")
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = torch.nn.Linear(3, 2, bias=False)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for params, state in run(with_average(optax.sgd(0.1), 0.9)):
        with torch.no_grad():
            model.weight.copy_(torch.tensor(np.asarray(params["a"]["kernel"])))
        averaged.update_parameters(model)
        np.testing.assert_allclose(
            state.average["a"]["kernel"], averaged.module.weight.detach().numpy(), rtol=1e-6, atol=1e-6
        )


def test_training_goes_on_as_without():
    plain, averaged = run(optax.adam(0.1)), run(with_average(optax.adam(0.1), 0.9))
    for (a, inner), (b, state) in zip(plain, averaged, strict=True):
        jax.tree.map(np.testing.assert_array_equal, (a, inner), (b, state.inner))


def test_what_is_evaluated():
    params, state = run(with_average(optax.adam(0.1), 0.9))[-1]
    assert evaluation_params(state, params) is state.average
    assert evaluation_params(state, params, use_average=False) is params
    params, state = run(optax.adam(0.1))[-1]
    assert evaluation_params(state, params) is params


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_schedule_free_is_evaluated_at_its_average(clip_norm):
    config = OptimConfig(name="schedule_free_adamw", schedule="constant", learning_rate=0.1, clip_norm=clip_norm)
    seen = run(make_optimizer(config, lambda step: 0.1))
    # x is the mean of z where the learning rate never changes.
    z = [(state if clip_norm is None else state[1]).z for _, state in seen]
    mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *z)
    params, state = seen[-1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), evaluation_params(state, params), mean
    )


def test_the_average_is_an_array_of_its_own():
    state = with_average(optax.sgd(0.1), 0.9).init(PARAMS)
    # Else a step could not be given both the parameters and the state to write over.
    first, second = (jax.tree.leaves(tree)[0].unsafe_buffer_pointer() for tree in (PARAMS, state.average))
    assert first != second
