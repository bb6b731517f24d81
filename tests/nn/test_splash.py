"""The TPU kernel, interpreted on the CPU, against plain attention: values and gradients, packed rows included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn.attention.kernels import splash
from jaxft.nn.attention.layer import attend, causal_mask
from jaxft.nn.attention.score_form import PLAIN, ScoreForm

LENGTH = 256
# Three documents and padding.
SEGMENTS = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([90, 40, 100, 26]))[None]
REAL = np.asarray(SEGMENTS > 0)


def drawn(heads=4, kv_heads=2, head_dim=64):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (
        jax.random.normal(key, (1, LENGTH, count, head_dim))
        for key, count in zip(keys, (heads, kv_heads, kv_heads), strict=False)
    )
    return q, k, v, jax.random.normal(keys[3], (heads,))


def plain(q, k, v, form, sinks):
    positions = jnp.broadcast_to(jnp.arange(LENGTH), SEGMENTS.shape)
    mask = causal_mask(positions, positions, SEGMENTS, SEGMENTS, window=form.window)
    return attend(q, k, v, mask, form, sinks)


def by_kernel(q, k, v, form, sinks):
    heads, head_dim = q.shape[2:]
    kernel = splash.kernel(LENGTH, LENGTH, heads, form, head_dim=head_dim, head_shards=1, shards=1, interpret=True)
    return splash.attention(kernel, q, k, v, SEGMENTS, SEGMENTS, form, sinks)


@pytest.fixture
def small_blocks(monkeypatch):
    """A row is two blocks; with a window or wide heads it is one, of which wide heads take a half at a time."""
    monkeypatch.setattr(splash, "BLOCK", 128)
    monkeypatch.setattr(splash, "SMALL_BLOCK", 256)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("form", "sinks", "sizes"),
    [
        (PLAIN, False, {}),
        (PLAIN, False, {"partial_sums": 1}),
        (PLAIN, False, {"heads": 2, "kv_heads": 2, "head_dim": 128}),
        (ScoreForm(window=70), False, {}),
        (ScoreForm(softcap=5.0, scale=0.3), False, {}),
        (ScoreForm(window=70), True, {}),
        (PLAIN, False, {"head_dim": 96}),
        (ScoreForm(window=70), False, {"head_dim": 256}),
    ],
    ids=[
        "grouped",
        "two kernels for gradients",
        "one head each",
        "window",
        "soft cap",
        "sinks",
        "odd heads",
        "wide heads",
    ],
)
def test_the_kernel_is_plain_attention(form, sinks, sizes, monkeypatch):
    monkeypatch.setattr(splash, "MOST_PARTIAL_SUMS", sizes.pop("partial_sums", splash.MOST_PARTIAL_SUMS))
    q, k, v, sink_scores = drawn(**sizes)
    sinks = sink_scores if sinks else None
    weight = jnp.where(SEGMENTS > 0, 1.0, 0.0)[..., None, None] * jnp.cos(jnp.arange(q.shape[-1]))

    def total(attention):
        # Padding looks at padding in one and at nothing in the other; no one reads what comes of it.
        return lambda q, k, v, sinks: jnp.sum(attention(q, k, v, form, sinks) * weight)

    with jax.default_matmul_precision("highest"):
        ours, one = by_kernel(q, k, v, form, sinks), plain(q, k, v, form, sinks)
        np.testing.assert_allclose(np.asarray(ours)[REAL], np.asarray(one)[REAL], rtol=0, atol=2e-5)
        wrt = (0, 1, 2, 3) if sinks is not None else (0, 1, 2)
        got = jax.grad(total(by_kernel), wrt)(q, k, v, sinks)
        expected = jax.grad(total(plain), wrt)(q, k, v, sinks)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_long_rows_keep_no_gradient_of_queries_for_each_block_of_keys():
    short, long, local, wide = (
        splash.block_sizes(length, length, window=window, head_dim=head_dim)
        for length, window, head_dim in ((4096, None, 128), (8192, None, 128), (4096, 512, 128), (4096, None, 256))
    )
    assert short.use_fused_bwd_kernel
    assert not any(sizes.use_fused_bwd_kernel for sizes in (long, local, wide))
    assert [sizes.block_kv for sizes in (short, long, local, wide)] == [1024, 1024, 512, 512]


def test_rows_that_are_no_whole_blocks_are_for_the_other_form():
    assert splash.fits(4096, 1) and splash.fits(4096, 16)
    assert not splash.fits(4000, 1) and not splash.fits(1024, 16)
