"""What the GPU's kernel is asked for, computed by the same function's plain implementation, is plain attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn import blockwise, cudnn
from jaxft.nn.score_form import PLAIN, ScoreForm

SEGMENTS = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([20, 9, 30, 5]))[None]


@pytest.mark.parametrize("form", [PLAIN, ScoreForm(window=7, scale=0.4)], ids=["plain", "window"])
@pytest.mark.parametrize("part", [0, 1])
def test_the_mask_and_scale_are_those_of_the_other_forms(form, part):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 64, n, 16)) for key, n in zip(keys, (4, 2, 2), strict=True))
    rows = slice(32 * part, 32 * part + 32)
    start = jnp.int32(32 * part)
    got = cudnn.attention(q[:, rows], k, v, SEGMENTS[:, rows], SEGMENTS, form, start, implementation="xla")
    whole = blockwise.attention(q, k, v, SEGMENTS, form)
    other = blockwise.attention(q[:, rows], k, v, SEGMENTS[:, rows], form, key_segments_BT=SEGMENTS, start=start)
    real = np.asarray(SEGMENTS[:, rows] > 0)
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(whole[:, rows])[real], rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.asarray(other)[real], np.asarray(whole[:, rows])[real], rtol=0, atol=2e-6)


def test_what_the_kernel_does_not_compute_is_for_the_other_form():
    half = jnp.zeros((1, 8, 4, 64), jnp.bfloat16)
    assert cudnn.fits(half, PLAIN, None)
    assert not cudnn.fits(half.astype(jnp.float32), PLAIN, None)
    assert not cudnn.fits(half, ScoreForm(softcap=30.0), None)
    assert not cudnn.fits(half, PLAIN, jnp.zeros(4))
    assert not cudnn.fits(jnp.zeros((1, 8, 4, 256), jnp.bfloat16), PLAIN, None)
