"""Attention in blocks, and its hand-made gradient, against automatic differentiation of the plain sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn.attention.kernels import blockwise
from jaxft.nn.attention.layer import attend, attend_cached, causal_mask
from jaxft.nn.attention.score_form import ScoreForm

# (form, with sinks)
FORMS = {
    "plain": (ScoreForm(), False),
    "window": (ScoreForm(window=4), False),
    "softcap": (ScoreForm(softcap=1.5), False),
    "all": (ScoreForm(window=7, scale=0.9, softcap=2.0), True),
}
LENGTH = 14
SEGMENTS = jnp.array([[1] * 8 + [2] * 4 + [0] * 2, [1] * 14])
POSITIONS = jnp.array([[*range(8), *range(4), 0, 1], [*range(14)]])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 6)


def drawn():
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, out = (jax.random.normal(key, (2, LENGTH, n, 8)) for key, n in zip(keys, (4, 2, 2, 4), strict=False))
    return (q, k, v), jax.random.normal(keys[4], (4,)), out


def plain(form, q, k, v, sinks):
    # The mask leaves padding out of a row's own segment just as blocks do: segment 0 sees segment 0.
    mask = causal_mask(POSITIONS, POSITIONS, SEGMENTS, SEGMENTS, window=form.window)
    return attend(q, k, v, mask, form, sinks)


@pytest.mark.parametrize(("form", "with_sinks"), FORMS.values(), ids=FORMS)
def test_values_and_gradients(form, with_sinks):
    qkv, sinks, weight = drawn()
    arguments = (*qkv, sinks) if with_sinks else qkv

    def total(attention):
        def run(q, k, v, sinks=None):
            out = attention(q, k, v, sinks)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(run, argnums=tuple(range(len(arguments))), has_aux=True))(*arguments)

    (_, expected), expected_grads = total(lambda *x: plain(form, *x))
    (_, out), grads = total(lambda q, k, v, sinks: blockwise.attention(q, k, v, SEGMENTS, form, sinks))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(grad, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("form", "with_sinks"), FORMS.values(), ids=FORMS)
def test_the_form_for_caches_is_the_same(form, with_sinks):
    (q, k, v), sinks, _ = drawn()
    sinks = sinks if with_sinks else None
    mask = causal_mask(POSITIONS, POSITIONS, SEGMENTS, SEGMENTS, window=form.window)
    cached = jax.jit(attend_cached, static_argnums=4)(
        q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask, form, sinks
    )
    np.testing.assert_allclose(cached, plain(form, q, k, v, sinks), rtol=0, atol=1e-5)


def test_scores_at_the_cap_of_masked_tokens_leave_gradients_finite():
    (q, k, v), _, weight = drawn()
    total = lambda q: jnp.sum(blockwise.attention(1e4 * q, k, v, SEGMENTS, ScoreForm(softcap=1.0)) * weight)  # noqa: E731
    assert np.isfinite(jax.jit(jax.grad(total))(q)).all()


def test_a_sink_takes_its_share():
    (q, k, v), _, _ = drawn()
    none, some, all_ = (
        blockwise.attention(q, k, v, SEGMENTS, sinks_N=jnp.full((4,), sink)) for sink in (-1e4, 0.0, 1e4)
    )
    np.testing.assert_array_equal(none, blockwise.attention(q, k, v, SEGMENTS))
    assert (jnp.linalg.norm(some, axis=-1) < jnp.linalg.norm(none, axis=-1)).all()
    assert not np.any(all_)
