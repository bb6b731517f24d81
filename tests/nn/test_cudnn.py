"""What the GPU's kernel is asked for, computed by the same function's plain implementation, is plain attention; what is
lowered for a GPU calls that kernel.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxft.nn.attention import causal
from jaxft.nn.attention.kernels import blockwise, cudnn
from jaxft.nn.attention.score_form import PLAIN, ScoreForm
from jaxft.nn.stack import REMAT

SEGMENTS = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([20, 9, 30, 5]))[None]
KERNELS = ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward")


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


def test_whole_rows_are_left_to_the_kernels_own_causal_order():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 64, n, 16)) for key, n in zip(keys, (4, 2, 2), strict=True))
    form = ScoreForm(window=7)
    got = cudnn.attention(q, k, v, SEGMENTS, SEGMENTS, form, None, implementation="xla")
    np.testing.assert_allclose(got, blockwise.attention(q, k, v, SEGMENTS, form), rtol=0, atol=2e-6)


def test_what_the_kernel_does_not_compute_is_for_the_other_form():
    half = jnp.zeros((1, 8, 4, 64), jnp.bfloat16)
    assert cudnn.fits(half, 8, PLAIN, None)
    assert not cudnn.fits(half.astype(jnp.float32), 8, PLAIN, None)
    assert not cudnn.fits(half, 8, ScoreForm(softcap=30.0), None)
    assert not cudnn.fits(half, 8, PLAIN, jnp.zeros(4))
    assert not cudnn.fits(jnp.zeros((1, 8, 4, 256), jnp.bfloat16), 8, PLAIN, None)
    assert not cudnn.fits(half[:, :7], 8, PLAIN, None) and not cudnn.fits(half, 9, PLAIN, None)


def lowered(monkeypatch, *, dtype=jnp.bfloat16, head_dim=64, length=64, form=PLAIN, sinks=False, remat=None, **axes):
    """The program of attention and its gradients for NVIDIA GPUs, as StableHLO. axes: of the mesh."""
    # JAX asks the machine that it lowers on for cuDNN, and there is none here.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    sizes = {name: axes.get(name, 1) for name in ("slice", "data", "fsdp", "expert", "context", "tensor")}
    kinds = (AxisType.Auto,) * len(sizes)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), kinds, abstract_device=device)

    def attention(q, k, v, segments, sinks_N):
        return causal.causal_attention(q, k, v, segments, form, sinks_N)

    def loss(*args):
        again = attention if remat is None else jax.checkpoint(attention, policy=REMAT[remat])
        with jax.sharding.use_abstract_mesh(mesh):
            return again(*args).astype(jnp.float32).sum()

    args = [jax.ShapeDtypeStruct((4, length, heads, head_dim), dtype) for heads in (8, 2, 2)]
    args += [jax.ShapeDtypeStruct((4, length), jnp.int32), jax.ShapeDtypeStruct((8,), dtype) if sinks else None]
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (*KERNELS, "LayoutConstraint")]
    gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    exported = jax.export.export(gradients, platforms=["cuda"], disabled_checks=allowed)(*args)
    return exported.mlir_module()


@pytest.mark.parametrize(
    ("options", "order"),
    [({}, "CAUSAL"), ({"form": ScoreForm(window=16)}, "CAUSAL"), ({"fsdp": 2, "tensor": 2}, "CAUSAL"),
     ({"context": 4}, "NO_MASK")],
    ids=["plain", "window", "mesh", "context"],
)  # fmt: skip
def test_the_kernel_is_called_forward_and_backward(monkeypatch, options, order):
    text = lowered(monkeypatch, **options)
    assert set(re.findall(r"__cudnn\$\w+", text)) == set(KERNELS)
    assert set(re.findall(r"mask_type\W+22: \W+22(\w+)", text)) == {order}


def calls(text):
    """The program's calls of the kernel: target, configuration, types of the operands, types of the results."""
    found = re.findall(r'@(__cudnn\$\w+)\(.*?backend_config = "((?:[^"\\]|\\.)*)".*? : \((.*?)\) -> \((.*?)\)', text)
    return {target: (config, operands.split(", "), results.split(", ")) for target, config, operands, results in found}


@pytest.mark.parametrize(
    "options", [{}, {"form": ScoreForm(window=16)}, {"context": 4}], ids=["plain", "window", "part"]
)
def test_the_kernel_computes_gradients_of_queries_keys_and_values_alone(monkeypatch, options):
    found = calls(lowered(monkeypatch, **options))
    queries = 64 // options.get("context", 1)
    mask, workspace = f"tensor<4x1x{queries}x64xbf16>", "tensor<0xui8>"
    _, operands, results = found[KERNELS[1]]
    kv_heads = "tensor<4x2x64x64xbf16>"
    assert results == [f"tensor<4x8x{queries}x64xbf16>", kv_heads, kv_heads, workspace]
    assert operands.count(mask) == 1 and found[KERNELS[0]][1].count(mask) == 1


@pytest.mark.parametrize("options", [{}, {"context": 4}], ids=["whole rows", "part"])
def test_it_is_called_as_by_the_public_function_but_for_that_gradient(monkeypatch, options):
    if not cudnn.differentiates_masks():
        pytest.skip("the public function of this JAX does not compute that gradient either")
    own = calls(lowered(monkeypatch, **options))
    monkeypatch.setattr(cudnn, "differentiates_masks", lambda: False)
    public = calls(lowered(monkeypatch, **options))
    assert own[KERNELS[0]] == public[KERNELS[0]]
    (config, operands, results), (public_config, public_operands, public_results) = own[KERNELS[1]], public[KERNELS[1]]
    assert (config, operands) == (public_config, public_operands)
    assert results == public_results[:3] + public_results[4:]


@pytest.mark.parametrize(("remat", "times"), [("full", 2), ("attention", 1), ("dots", 1)])
def test_what_rematerialisation_keeps_of_the_kernel_is_not_computed_again(monkeypatch, remat, times):
    assert lowered(monkeypatch, remat=remat, context=2).count(f"custom_call @{KERNELS[0]}(") == times


@pytest.mark.parametrize(
    "options",
    [{"dtype": jnp.float32}, {"form": ScoreForm(softcap=30.0)}, {"sinks": True}, {"head_dim": 256}, {"length": 63}],
    ids=["float32", "cap", "sinks", "wide", "odd"],
)
def test_what_it_does_not_take_is_lowered_without_it(monkeypatch, options):
    text = lowered(monkeypatch, **options)
    assert "__cudnn" not in text and "dot_general" in text
