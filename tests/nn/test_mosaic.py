"""Attention by tokamax's kernels: what they are asked for, computed by the library's own reference, is plain attention;
what is lowered for a Hopper calls them and has no array of queries by keys.
"""

import re
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxft.nn.attention import causal
from jaxft.nn.attention.kernels import blockwise, mosaic
from jaxft.nn.attention.score_form import PLAIN, ScoreForm
from jaxft.nn.stack import REMAT
from jaxft.optional import tokamax_module

reference = tokamax_module("tokamax._src.ops.attention.base")
if reference is None:
    pytest.skip("tokamax is not installed, or does not work with this JAX", allow_module_level=True)

SEGMENTS = jnp.repeat(
    jnp.array([[1, 2, 3, 0], [5, 5, 4, 9]]), jnp.array([20, 9, 30, 5]), axis=1, total_repeat_length=64
)  # fmt: skip


@pytest.fixture
def by_reference(monkeypatch):
    """The library's reference in place of its kernels, which have no form for CPUs."""
    operation = reference.DotProductAttention(vjp=reference.DotProductAttentionVjp())
    monkeypatch.setattr(mosaic, "_library", lambda: mosaic._Library(reference.Mask, operation))


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize(
    "form", [PLAIN, ScoreForm(window=7, scale=0.4), ScoreForm(softcap=3.0)], ids=["plain", "window", "cap"]
)
@pytest.mark.parametrize("part", [None, 0, 1])
def test_queries_see_the_same_keys_as_in_the_other_form(form, part):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (jax.random.normal(key, (2, 64, n, 16)) for key, n in zip(keys, (4, 2, 2, 4), strict=True))
    rows = slice(None) if part is None else slice(32 * part, 32 * part + 32)
    start = None if part is None else jnp.int32(32 * part)

    def by_kernel(q, k, v):
        return mosaic.attention(q[:, rows], k, v, SEGMENTS, form, start)

    def by_blocks(q, k, v):
        return blockwise.attention(q, k, v, SEGMENTS, form)[:, rows]

    got, pull = jax.vjp(by_kernel, q, k, v)
    expected, expected_pull = jax.vjp(by_blocks, q, k, v)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
    for grad, wanted in zip(pull(weights[:, rows]), expected_pull(weights[:, rows]), strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=0, atol=1e-5)


@dataclass(frozen=True)
class Device:
    """What is asked of a GPU."""

    compute_capability: str | None
    device_kind: str = "NVIDIA H100 80GB HBM3"
    platform: str = "gpu"


HOPPER = Device("9.0")


@pytest.fixture
def on_hopper(monkeypatch):
    """The default device is one for which the library has kernels. No other thing of it is asked for."""
    monkeypatch.setattr("jax.extend.backend.get_default_device", lambda: HOPPER)
    monkeypatch.setattr(mosaic, "get_default_device", lambda: HOPPER)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


def half(*, length=256, head_dim=64, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((2, length, 4, head_dim), dtype)


@pytest.mark.usefixtures("on_hopper")
def test_what_the_kernels_do_not_compute_is_for_the_other_forms(monkeypatch):
    assert mosaic.fits(half(), 512, None, value_dim=64)
    assert not mosaic.fits(half(dtype=jnp.float32), 512, None, value_dim=64)
    assert not mosaic.fits(half(head_dim=96), 512, None, value_dim=96)
    assert not mosaic.fits(half(), 512, None, value_dim=128)
    assert not mosaic.fits(half(), 512, jnp.zeros(4), value_dim=64)
    assert not mosaic.fits(half(length=192), 512, None, value_dim=64)
    assert not mosaic.fits(half(), 320, None, value_dim=64)
    for capability in ("8.0", "10.0", "12.0", None):
        monkeypatch.setattr(mosaic, "get_default_device", partial(Device, capability))
        assert not mosaic.fits(half(), 512, None, value_dim=64)


def test_a_cpu_has_no_such_kernels():
    assert not mosaic.fits(half(), 512, None, value_dim=64)


def lowered(*, remat=None, **axes):
    """The program of attention of 2 x 512 tokens and its gradients for NVIDIA GPUs, as StableHLO. axes: of the mesh."""
    device = AbstractDevice(device_kind=HOPPER.device_kind, num_cores=None, platform="gpu")
    sizes = {name: axes.get(name, 1) for name in ("slice", "data", "fsdp", "expert", "context", "tensor")}
    kinds = (AxisType.Auto,) * len(sizes)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), kinds, abstract_device=device)

    def loss(*args):
        attention = causal.causal_attention
        again = attention if remat is None else jax.checkpoint(attention, policy=REMAT[remat])
        with jax.sharding.use_abstract_mesh(mesh):
            return again(*args).astype(jnp.float32).sum()

    args = [jax.ShapeDtypeStruct((2, 512, heads, 64), jnp.bfloat16) for heads in (8, 2, 2)]
    args += [jax.ShapeDtypeStruct((2, 512), jnp.int32)]
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "LayoutConstraint")]
    gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    return jax.export.export(gradients, platforms=["cuda"], disabled_checks=allowed)(*args).mlir_module()


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 2}, {"context": 2}], ids=["one", "mesh", "context"])
def test_packed_rows_need_no_array_of_queries_by_keys(axes):
    text = lowered(**axes)
    assert text.count("@mosaic_gpu_v2(") == 3 and "__cudnn" not in text
    queries = 512 // axes.get("context", 1)
    assert not re.search(rf"<(\d+x)*{queries}x512x", text)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("remat", "kernels"), [("full", 4), ("attention", 3), ("dots", 3)])
def test_what_rematerialisation_keeps_is_not_computed_again(remat, kernels):
    assert lowered(remat=remat).count("@mosaic_gpu_v2(") == kernels


@pytest.mark.usefixtures("on_hopper")
def test_without_the_library_there_is_a_mask(monkeypatch):
    monkeypatch.setattr(mosaic, "_library", lambda: None)
    assert not mosaic.fits(half(), 512, None, value_dim=64)
    with pytest.raises(RuntimeError, match="not installed"):
        mosaic.attention(*(jnp.zeros((1, 256, n, 64)) for n in (4, 2, 2)), jnp.ones((1, 256), int), PLAIN, None)
