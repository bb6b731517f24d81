"""Causal attention on NVIDIA GPUs: cuDNN's fused kernel, through `jax.nn.dot_product_attention`."""

# B batch, S queries, T keys, N query heads, K kv heads, H head_dim

import inspect
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.extend.core import Primitive

from jaxft.nn.attention.score_form import ScoreForm, score_scale

MOST_HEAD_DIM, HEAD_DIM_STEP = 128, 8
# The arguments of the function below the public one, in the releases of JAX that always compute a bias's gradient.
FUSED_ARGUMENTS = (
    "query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "page_table_k", "page_table_v",
    "scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length", "cudnn_version",
    "return_residual",
)  # fmt: skip


def fits(
    q_BSNH: jax.Array, keys: int, form: ScoreForm, sinks_N: jax.Array | None, *, value_dim: int | None = None
) -> bool:
    """Whether the kernel supports these arguments. It needs half precision, one of its head sizes, neither cap nor
    sinks, and even numbers of queries and keys, because with a mask it has no gradient for odd numbers.
    """
    _, queries, _, head_dim = q_BSNH.shape
    right_heads = head_dim <= MOST_HEAD_DIM and head_dim % HEAD_DIM_STEP == 0 and value_dim in (None, head_dim)
    plain = q_BSNH.dtype in (jnp.bfloat16, jnp.float16) and form.softcap is None and sinks_N is None
    return plain and right_heads and queries % 2 == 0 and keys % 2 == 0


def save_kernel_results(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """A rematerialisation policy that saves the kernel's results; policies by name cannot: its sums have no name."""
    return primitive.name.startswith("dot_product_attention_fwd")


def attention(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    query_segments_BS: jax.Array,
    key_segments_BT: jax.Array,
    form: ScoreForm,
    start: jax.Array | None,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """One device's part of the attention, [B, S, N, H] in q's dtype. start: position of its first query in the row.

    Packed rows need a mask [B, 1, S, T], which the kernel takes as a bias in the dtype of the scores; its gradient is
    not computed. For whole rows (start is None) the kernel is also told that they are causal; it then skips the half
    that queries do not see.
    """
    queries_S1 = jnp.arange(q_BSNH.shape[1])[:, None] + (0 if start is None else start)
    keys_T = jnp.arange(k_BTKH.shape[1])
    seen_ST = keys_T <= queries_S1
    if form.window is not None:
        seen_ST &= keys_T > queries_S1 - form.window
    mask_BST = seen_ST & (query_segments_BS[:, :, None] == key_segments_BT[:, None, :])
    scale, is_causal = score_scale(form, q_BSNH.shape[-1]), start is None
    if implementation == "cudnn" and differentiates_masks():
        return _without_gradient_of_mask(q_BSNH, k_BTKH, v_BTKH, mask_BST[:, None], scale, is_causal)
    return jax.nn.dot_product_attention(
        q_BSNH,
        k_BTKH,
        v_BTKH,
        mask=mask_BST[:, None],
        scale=scale,
        is_causal=is_causal,
        implementation=implementation,
    )


def differentiates_masks() -> bool:
    """Whether JAX's public function has cuDNN compute a gradient of the bias that it makes of a boolean mask.

    JAX does so before 0.12. For that gradient cuDNN keeps those of all scores, 2 B N S T bytes: 2 GiB for two rows of
    4,096 tokens and 32 heads, 64 GiB for one of 32,768.
    """
    function = getattr(fused, "_dot_product_attention", None)
    return function is not None and tuple(inspect.signature(function).parameters) == FUSED_ARGUMENTS


def _without_gradient_of_mask(
    q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_B1ST: jax.Array, scale: float, is_causal: bool
) -> jax.Array:
    """What the public function computes, but for the gradient of the mask, which the public one always asks for."""
    unused = jnp.zeros(0, q_BSNH.dtype)
    return fused._dot_product_attention(
        q_BSNH,
        k_BTKH,
        v_BTKH,
        fused.combine_bias_and_mask(None, mask_B1ST, q_BSNH.dtype),
        *[unused] * 6,  # lengths, offsets and tables of pages
        scale,
        42,  # the seed of a dropout of 0
        0.0,
        (True, False),  # there is a bias, whose gradient is not wanted
        fused.MaskType.CAUSAL if is_causal else fused.MaskType.NO_MASK,
        fused.AttentionLayout.BTNH.value,
        None,
        fused.check_cudnn_version(),
        False,
    )
