"""What the GPU's kernel is asked for, computed by the same function's plain implementation, is plain attention."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.cudnn import fused_attention_stablehlo as lowering

from jaxft.nn import blockwise, cudnn, partition
from jaxft.nn.causal import causal_attention
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


@pytest.mark.parametrize(("dtype", "called"), [("bfloat16", True), ("float32", False)])
def test_lowered_for_cuda_it_is_cudnn_s_kernel_both_ways(dtype, called, monkeypatch):
    """Lowered where there is no GPU, hence without the questions that JAX would ask of one."""
    monkeypatch.setattr(partition, "platform", lambda: "gpu")
    monkeypatch.setattr(lowering, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(lowering, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(lowering, "is_cuda_compute_capability_equal", lambda capability: False)
    q, k = (jax.ShapeDtypeStruct((2, 256, heads, 64), dtype) for heads in (8, 2))
    segments = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def total(q, k, v, segments):
        return causal_attention(q, k, v, segments, ScoreForm(window=64)).astype(jnp.float32).sum()

    kernels = ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]
    unchecked = [export.DisabledSafetyCheck.custom_call(name) for name in kernels]
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    text = export.export(gradient, platforms=["cuda"], disabled_checks=unchecked)(q, k, k, segments).mlir_module()
    assert set(re.findall(r"__cudnn\$\w+", text)) == (set(kernels) if called else set())
