"""Causal attention on NVIDIA GPUs: cuDNN's fused kernel, through `jax.nn.dot_product_attention`."""

# B batch, S queries, T keys, N query heads, K kv heads, H head_dim

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from jaxft.nn.attention.score_form import ScoreForm, score_scale

MOST_HEAD_DIM, HEAD_DIM_STEP = 128, 8


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

    Packed rows need a mask [B, 1, S, T], which the kernel takes as a bias in the dtype of the scores. For whole rows
    (start is None) the kernel is also told that they are causal; it then skips the half that queries do not see.
    """
    queries_S1 = jnp.arange(q_BSNH.shape[1])[:, None] + (0 if start is None else start)
    keys_T = jnp.arange(k_BTKH.shape[1])
    seen_ST = keys_T <= queries_S1
    if form.window is not None:
        seen_ST &= keys_T > queries_S1 - form.window
    mask_BST = seen_ST & (query_segments_BS[:, :, None] == key_segments_BT[:, None, :])
    return jax.nn.dot_product_attention(
        q_BSNH,
        k_BTKH,
        v_BTKH,
        mask=mask_BST[:, None],
        scale=score_scale(form, q_BSNH.shape[-1]),
        is_causal=start is None,
        implementation=implementation,
    )
