"""Causal attention on NVIDIA's Hopper GPUs: kernels of the library tokamax, which need no mask.

Of packed rows they read where each query's document begins, one number a query, and they skip blocks of keys before it.
A mask has one number for each query and key.
"""

# B batch, S queries, T keys, N query heads, K kv heads, H head_dim

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.backend import get_default_device

from jaxft.nn.attention.score_form import ScoreForm, score_scale
from jaxft.optional import tokamax_module

HEAD_DIMS = (64, 128)
LENGTH_STEP = 128  # of queries and keys: the largest block of the kernels
# The name of the part of a program that is these kernels, for plans; CAUSAL if they skip what causal order hides.
SCOPE, CAUSAL = "mosaic_attention", "mosaic_attention_causal"
# CUDA's compute capability of Hopper. Those of tokamax 0.0.12 for Blackwell do not compile for heads of 128: they need
# 291 KiB of shared memory, and a block may have 227.
HOPPER = 9.0


class _Library(NamedTuple):
    """tokamax's description of what each query sees, and its operation, whose attribute `vjp` computes gradients."""

    mask: Any
    operation: Any


class _Seen(NamedTuple):
    """The keys that each query sees.

    first_BS: the first of them. end_S: one after the last; None if the kernel's own causal order says it.
    """

    first_BS: jax.Array
    end_S: jax.Array | None


@functools.cache
def _library() -> _Library | None:
    """None if tokamax is absent or does not load with this JAX. Its public function has no argument for documents."""
    base, gpu = (tokamax_module(f"tokamax._src.ops.attention.{name}") for name in ("base", "pallas_mosaic_gpu"))
    return None if base is None or gpu is None else _Library(base.Mask, gpu.PallasMosaicGpuFlashAttention())


def fits(q_BSNH: jax.Array, keys: int, sinks_N: jax.Array | None, *, value_dim: int) -> bool:
    """Whether the kernels are installed, and support these arguments and the default device, for which they compile."""
    _, queries, _, head_dim = q_BSNH.shape
    shapes = head_dim in HEAD_DIMS and value_dim == head_dim and queries % LENGTH_STEP == 0 == keys % LENGTH_STEP
    plain = q_BSNH.dtype in (jnp.bfloat16, jnp.float16) and sinks_N is None
    return shapes and plain and _device_has_kernels() and _library() is not None


def _device_has_kernels() -> bool:
    device = get_default_device()
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    return capability is not None and float(capability) == HOPPER


def attention(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    key_segments_BT: jax.Array,
    form: ScoreForm,
    start: jax.Array | None,
) -> jax.Array:
    """One device's part of the attention, [B, S, N, H] in q's dtype. start: position of its first query in the row.

    The tokens of a segment are next to each other. Parts of rows (start is not None) are computed without the causal
    order of the kernels, which begins with the first key; then the gradient's kernels skip nothing.
    """
    seen = _seen(key_segments_BT, q_BSNH.shape[1], form.window, start)
    return _attend(q_BSNH, k_BTKH, v_BTKH, seen, score_scale(form, q_BSNH.shape[-1]), form.softcap)


def _seen(key_segments_BT: jax.Array, queries: int, window: int | None, start: jax.Array | None) -> _Seen:
    keys_T = jnp.arange(key_segments_BT.shape[1], dtype=jnp.int32)
    changes_BT = key_segments_BT[:, 1:] != key_segments_BT[:, :-1]
    begins_BT = jnp.pad(changes_BT, ((0, 0), (1, 0)), constant_values=True)
    first_BT = jax.lax.cummax(jnp.where(begins_BT, keys_T, 0), axis=1)
    if window is not None:
        first_BT = jnp.maximum(first_BT, keys_T - window + 1)
    if start is None:
        return _Seen(first_BT, None)
    return _Seen(jax.lax.dynamic_slice_in_dim(first_BT, start, queries, axis=1), start + jnp.arange(1, queries + 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, seen: _Seen, scale: float, softcap: float | None
) -> jax.Array:
    return _forward(q_BSNH, k_BTKH, v_BTKH, seen, scale, softcap)[0]


# tokamax's own gradient is not used: what it keeps has no names, which rematerialisation policies need.
def _forward(
    q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, seen: _Seen, scale: float, softcap: float | None
) -> tuple[jax.Array, tuple[Any, ...]]:
    operation, options = _call(seen, scale, softcap)
    with jax.named_scope(_scope(seen)):
        out_BSNH, sums = operation(q_BSNH, k_BTKH, v_BTKH, **options, return_residuals=True)
    out_BSNH, sums = checkpoint_name((out_BSNH, sums), "attention")
    return out_BSNH, (q_BSNH, k_BTKH, v_BTKH, seen, out_BSNH, sums)


def _backward(
    scale: float, softcap: float | None, kept: tuple[Any, ...], grad_BSNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BSNH, k_BTKH, v_BTKH, seen, out_BSNH, sums = kept
    operation, options = _call(seen, scale, softcap)
    complete = operation.bind(q_BSNH, k_BTKH, v_BTKH, **options)
    with jax.named_scope(_scope(seen)):
        grads = operation.vjp(sums, out_BSNH, grad_BSNH, *complete.args, **complete.kwargs)
    return grads["q"], grads["k"], grads["v"], None


_attend.defvjp(_forward, _backward)


def _scope(seen: _Seen) -> str:
    return CAUSAL if seen.end_S is None else SCOPE


def _call(seen: _Seen, scale: float, softcap: float | None) -> tuple[Any, dict[str, Any]]:
    """tokamax's operation, and its arguments after queries, keys and values."""
    library = _library()
    if library is None:
        raise RuntimeError("tokamax is not installed, or does not load with this JAX: ask `fits` first")
    # One for all heads; the last keys are the same in every row.
    end = None if seen.end_S is None else seen.end_S[None, None]
    mask = library.mask(k_start=seen.first_BS[:, None], k_end=end, is_causal=seen.end_S is None)
    return library.operation, {"mask": mask, "logits_scale": scale, "logits_soft_cap": softcap}
