"""State spaces in chunks against their definition step by step, in float64, and across borders of documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn.recurrent import state_space as module
from jaxft.nn.recurrent.state_space import StateSpaceInputs, state_space, state_space_step

B, G, R, P, N = 2, 2, 3, 5, 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)


def draw(length):
    rng = np.random.default_rng(0)
    return StateSpaceInputs(
        rng.normal(size=(B, length, G, R, P)),
        -rng.exponential(size=(B, length, G, R)),
        rng.normal(size=(B, length, G, N)),
        rng.normal(size=(B, length, G, N)),
    )


def by_steps(inputs, documents):
    """The definition in float64; the state begins anew with each document."""
    state, out = np.zeros((B, G, R, P, N)), np.zeros(inputs.x_BSGRP.shape)
    for i in range(out.shape[1]):
        x, decay, b, c = (np.asarray(part[:, i], np.float64) for part in inputs)
        if i:
            state = state * (documents[:, i] == documents[:, i - 1])[:, None, None, None, None]
        state = state * np.exp(decay)[..., None, None] + x[..., None] * b[:, :, None, None]
        out[:, i] = np.einsum("bgrpn,bgn->bgrp", state, c)
    return out, state


def single(inputs):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs)


def rows(*lengths):
    return np.tile(np.repeat(np.arange(1, len(lengths) + 1), lengths), (B, 1)).astype(np.int32)


ZERO = np.zeros((B, G, R, P, N), np.float32)


@pytest.mark.parametrize(
    "documents",
    [rows(1), rows(7), rows(16), rows(50), rows(15, 17, 18), rows(16, 16, 9), rows(17, 3, 1, 1, 20), rows(1, 40)],
    ids=lambda x: "+".join(map(str, np.bincount(x[0])[1:])),
)
def test_chunks_equal_steps_inside_on_and_beside_borders(documents):
    inputs = draw(documents.shape[1])
    out, state = by_steps(inputs, documents)
    ours, end = jax.jit(state_space)(single(inputs), jnp.asarray(documents), ZERO)
    np.testing.assert_allclose(ours, out, atol=1e-5)
    np.testing.assert_allclose(end, state, atol=1e-5)


def test_gradients_equal_those_of_the_steps():
    """In float64: what is left of a sum of float32, 41 steps long, depends on the processor."""
    with jax.enable_x64(True):
        inputs, documents = jax.tree.map(jnp.asarray, draw(41)), rows(18, 23)
        zero = jnp.asarray(ZERO, jnp.float64)
        target = jax.random.normal(jax.random.key(0), inputs.x_BSGRP.shape, jnp.float64)

        def steps(inputs):
            def body(state, now):
                y, state = state_space_step(jax.tree.map(lambda x: x[:, None], now), state)
                return state, y[:, 0]

            _, y = jax.lax.scan(body, zero, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs))
            return jnp.moveaxis(y, 0, 1)

        def chunks(inputs):
            return state_space(inputs, jnp.asarray(documents), zero)[0]

        def loss(run, part, inputs):
            return jnp.sum(jnp.tanh(run(inputs)) * target[:, part])

        packed = jax.jit(jax.grad(functools.partial(loss, chunks, slice(None))))(inputs)
        for part in (slice(0, 18), slice(18, 41)):
            cut = StateSpaceInputs(*(x[:, part] for x in inputs))
            alone = jax.jit(jax.grad(functools.partial(loss, steps, part)))(cut)
            for ours, theirs in zip(packed, alone, strict=True):
                assert ours.dtype == theirs.dtype == jnp.float64
                np.testing.assert_allclose(ours[:, part], theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 15, 16, 30])
def test_a_row_goes_on_from_its_state(cut):
    inputs, documents = single(draw(37)), jnp.asarray(rows(37))
    whole, end = state_space(inputs, documents, ZERO)
    first, state = state_space(jax.tree.map(lambda x: x[:, :cut], inputs), documents[:, :cut], ZERO)
    rest, last = state_space(jax.tree.map(lambda x: x[:, cut:], inputs), documents[:, cut:], state)
    np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), whole, atol=1e-5)
    np.testing.assert_allclose(last, end, atol=1e-5)


def test_padding_changes_no_state_and_large_decays_give_no_nan():
    inputs, documents = single(draw(20)), jnp.asarray(rows(20))
    still = jnp.arange(20)[None, :, None, None] < 13
    padded = inputs._replace(
        x_BSGRP=jnp.where(still[..., None], inputs.x_BSGRP, 0), decay_BSGR=jnp.where(still, inputs.decay_BSGR, 0)
    )
    _, end = state_space(jax.tree.map(lambda x: x[:, :13], inputs), documents[:, :13], ZERO)
    np.testing.assert_allclose(state_space(padded, documents, ZERO)[1], end, atol=1e-5)
    steep = inputs._replace(decay_BSGR=inputs.decay_BSGR * 1e4)
    for grad in jax.grad(lambda inputs: state_space(inputs, documents, ZERO)[0].sum())(steep):
        assert np.isfinite(grad).all()
