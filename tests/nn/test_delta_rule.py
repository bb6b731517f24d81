"""The gated delta rule in chunks against its definition step by step, in float64, and across borders of documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn.recurrent import delta_rule as module
from jaxft.nn.recurrent.convolution import Convolution
from jaxft.nn.recurrent.delta_rule import DeltaInputs, delta_rule, delta_step, unit_inverse

B, H, R, K, V = 2, 2, 3, 8, 5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)


def draw(length, seed=0, *, alike=0.0):
    """Random inputs. alike: the share of every key that is the same for all positions."""
    rng = np.random.default_rng(seed)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    keys = rng.normal(size=(B, length, H, K)) * (1 - alike) + rng.normal(size=(1, 1, H, K)) * alike
    return DeltaInputs(
        unit(rng.normal(size=(B, length, H, K))) * K**-0.5,
        unit(keys),
        rng.normal(size=(B, length, H, R, V)),
        -rng.exponential(size=(B, length, H, R)),
        rng.uniform(size=(B, length, H, R)),
    )


def by_steps(inputs, documents, state=None):
    """The definition in float64; the state begins anew with each document."""
    length = inputs.q_BSHK.shape[1]
    state = np.zeros((B, H, R, K, V)) if state is None else state.astype(np.float64)
    out = np.zeros((B, length, H, R, V))
    for i in range(length):
        q, k, v, g, beta = (np.asarray(x[:, i], np.float64) for x in inputs)
        if i:
            state = state * (documents[:, i] == documents[:, i - 1])[:, None, None, None, None]
        state = state * np.exp(g)[..., None, None]
        error = v - np.einsum("bhk,bhrkv->bhrv", k, state)
        state = state + np.einsum("bhk,bhrv->bhrkv", k, beta[..., None] * error)
        out[:, i] = np.einsum("bhk,bhrkv->bhrv", q, state)
    return out, state


def single(x):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), x)


def rows(*lengths):
    """Documents of these lengths, the same in every row."""
    return np.tile(np.repeat(np.arange(1, len(lengths) + 1), lengths), (B, 1)).astype(np.int32)


@pytest.mark.parametrize(
    "documents",
    [rows(1), rows(7), rows(16), rows(50), rows(15, 17, 18), rows(16, 16, 9), rows(17, 3, 1, 1, 20), rows(1, 40)],
    ids=lambda x: "+".join(map(str, np.bincount(x[0])[1:])),
)
def test_chunks_equal_steps_inside_on_and_beside_borders(documents):
    inputs = draw(documents.shape[1])
    out, state = by_steps(inputs, documents)
    zero = jnp.zeros((B, H, R, K, V))
    ours, end = jax.jit(delta_rule)(single(inputs), jnp.asarray(documents), zero)
    np.testing.assert_allclose(ours, out, atol=2e-6)
    np.testing.assert_allclose(end, state, atol=2e-6)


def test_gradients_equal_those_of_the_steps():
    """Those of a single document, cut out of a packed row, and none from other documents."""
    inputs, documents = single(draw(41)), rows(18, 23)
    target = jax.random.normal(jax.random.key(0), (B, 41, H, R, V))
    zero = jnp.zeros((B, H, R, K, V))

    def steps(inputs):
        def body(state, now):
            y, state = delta_step(jax.tree.map(lambda x: x[:, None], now), state)
            return state, y[:, 0]

        _, y = jax.lax.scan(body, zero, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs))
        return jnp.moveaxis(y, 0, 1)

    def chunks(inputs):
        return delta_rule(inputs, jnp.asarray(documents), zero)[0]

    def loss(run, inputs, part):
        return jnp.sum((run(inputs) * target[:, part]) ** 2)

    packed = jax.jit(jax.grad(functools.partial(loss, chunks, part=slice(None))))(inputs)
    for part in (slice(0, 18), slice(18, 41)):
        alone = jax.jit(jax.grad(functools.partial(loss, steps, part=part)))(jax.tree.map(lambda x: x[:, part], inputs))  # noqa: B023
        for ours, theirs in zip(packed, alone, strict=True):
            np.testing.assert_allclose(ours[:, part], theirs, atol=2e-5)


@pytest.mark.parametrize("cut", [1, 15, 16, 30])
def test_a_row_goes_on_from_its_state(cut):
    inputs, documents = single(draw(37)), jnp.asarray(rows(37))
    zero = jnp.zeros((B, H, R, K, V))
    whole, end = delta_rule(inputs, documents, zero)
    first, state = delta_rule(jax.tree.map(lambda x: x[:, :cut], inputs), documents[:, :cut], zero)
    rest, last = delta_rule(jax.tree.map(lambda x: x[:, cut:], inputs), documents[:, cut:], state)
    np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), whole, atol=2e-6)
    np.testing.assert_allclose(last, end, atol=2e-6)


def test_padding_changes_no_state():
    inputs, documents = single(draw(20)), jnp.asarray(rows(20))
    still = jnp.arange(20)[None, :, None, None] < 13
    inputs = inputs._replace(
        decay_BSHR=jnp.where(still, inputs.decay_BSHR, 0), rate_BSHR=jnp.where(still, inputs.rate_BSHR, 0)
    )
    zero = jnp.zeros((B, H, R, K, V))
    _, padded = delta_rule(inputs, documents, zero)
    _, end = delta_rule(jax.tree.map(lambda x: x[:, :13], inputs), documents[:, :13], zero)
    np.testing.assert_allclose(padded, end, atol=1e-6)


@pytest.mark.parametrize("alike", [0.9, 1.0])
def test_keys_that_are_nearly_equal(alike):
    """Where an inverse by powers of the matrix is wrong by many orders of magnitude."""
    inputs, documents = draw(128, alike=alike), rows(128)
    inputs = inputs._replace(rate_BSHR=np.ones_like(inputs.rate_BSHR), decay_BSHR=inputs.decay_BSHR * 1e-3)
    out, _ = by_steps(inputs, documents)
    ours, _ = delta_rule(single(inputs), jnp.asarray(documents), jnp.zeros((B, H, R, K, V)))
    np.testing.assert_allclose(ours, out, atol=1e-5)


def test_the_inverse():
    system = np.tril(np.random.default_rng(0).uniform(size=(3, 64, 64)), -1)
    exact = np.linalg.inv(np.eye(64) + system)
    np.testing.assert_allclose(unit_inverse(jnp.asarray(system, jnp.float32)), exact, atol=1e-5 * np.abs(exact).max())


def test_decays_that_leave_nothing_give_no_nan():
    inputs, documents = single(draw(40)), jnp.asarray(rows(25, 15))
    inputs = inputs._replace(decay_BSHR=inputs.decay_BSHR * 1e4)

    def total(inputs):
        return delta_rule(inputs, documents, jnp.ones((B, H, R, K, V)))[0].sum()

    for grad in jax.grad(total)(inputs):
        assert np.isfinite(grad).all()


def test_the_convolution_sees_its_own_document():
    from flax import nnx

    conv = Convolution(6, 4, use_bias=True, stddev=1.0, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv.bias.set_value(jnp.arange(6.0))
    x, documents = jax.random.normal(jax.random.key(1), (B, 12, 6)), jnp.asarray(rows(2, 7, 3))
    packed = conv(x, documents)
    taps = np.asarray(conv.taps.get_value())
    for start, stop in ((0, 2), (2, 9), (9, 12)):
        for channel in range(6):
            alone = np.convolve(x[0, start:stop, channel], taps[::-1, channel])[: stop - start] + channel
            np.testing.assert_allclose(packed[0, start:stop, channel], alone, atol=1e-5)
    whole, _ = conv.after(jnp.zeros((B, 3, 6)), x, jnp.ones((B, 12), bool))
    np.testing.assert_allclose(whole, conv(x, jnp.ones((B, 12), jnp.int32)), atol=1e-6)
    # In parts, the first of which ends in padding.
    padded = jnp.pad(x[:, :5], ((0, 0), (0, 4), (0, 0)), constant_values=9.0)
    first, inputs = conv.after(jnp.zeros((B, 3, 6)), padded, jnp.arange(9)[None] < jnp.full((B, 1), 5))
    rest, _ = conv.after(inputs, x[:, 5:], jnp.ones((B, 7), bool))
    np.testing.assert_allclose(jnp.concatenate([first[:, :5], rest], axis=1), whole, atol=1e-5)
