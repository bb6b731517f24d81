"""Causal attention in blocks of queries, with its own gradient: the form for CPUs and any odd shape.

No [S, S] scores outlive a block, the backward pass recomputes them from the saved log-sum-exp, and a
block looks only at the keys before its end, so half of the square is never computed. Source of the
recurrences: FlashAttention-2, arXiv:2307.08691, sections 2.3 and 3.1.
"""

# B batch, S sequence, N query heads, K kv heads, G = N / K, H head_dim, C queries of a block, T keys it sees

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Finite, so that a row with nothing to look at (padding) gives numbers and not NaN.
MASKED = -1e30
BLOCK, MOST_BLOCKS = 128, 8


class _Block(NamedTuple):
    start: int
    stop: int
    first_key: int


def causal_attention(
    q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BS: jax.Array, *, window: int | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the tokens of the same segment that stand no later, [B, S, N, H].

    Positions must ascend within a segment, as they do in any row of text. window: at most so many
    tokens back, itself included. The softmax is float32 whatever the inputs are.
    """
    batch, length, heads, head_dim = q_BSNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BSKGH = q_BSNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    out_BKGSH = _attention(
        window,
        checkpoint_name(jnp.transpose(q_BSKGH, (0, 2, 3, 1, 4)), "dots"),
        checkpoint_name(jnp.transpose(k_BSKH, (0, 2, 1, 3)), "dots"),
        checkpoint_name(jnp.transpose(v_BSKH, (0, 2, 1, 3)), "dots"),
        segments_BS,
    )
    return jnp.transpose(out_BKGSH, (0, 3, 1, 2, 4)).reshape(q_BSNH.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(window, q_BKGSH, k_BKSH, v_BKSH, segments_BS):
    return _forward(window, q_BKGSH, k_BKSH, v_BKSH, segments_BS)[0]


def _forward(window, q_BKGSH, k_BKSH, v_BKSH, segments_BS):
    outs, sums = [], []
    for block in _blocks(q_BKGSH.shape[3], window):
        scores_BKGCT = _scores(q_BKGSH, k_BKSH, segments_BS, block, window)
        top_BKGC1 = jnp.max(scores_BKGCT, axis=-1, keepdims=True)
        weights_BKGCT = jnp.exp(scores_BKGCT - top_BKGC1)
        total_BKGC1 = jnp.sum(weights_BKGCT, axis=-1, keepdims=True)
        v_BKTH = v_BKSH[:, :, block.first_key : block.stop]
        out_BKGCH = _rows(weights_BKGCT.astype(v_BKTH.dtype)) @ v_BKTH
        outs.append((out_BKGCH.reshape(*total_BKGC1.shape[:-1], -1) / total_BKGC1).astype(q_BKGSH.dtype))
        sums.append((jnp.log(total_BKGC1) + top_BKGC1)[..., 0])
    # Named, so that rematerialisation that keeps "dots" does not run this pass again.
    out_BKGSH = checkpoint_name(jnp.concatenate(outs, axis=3), "dots")
    lse_BKGS = checkpoint_name(jnp.concatenate(sums, axis=3), "dots")
    return out_BKGSH, (q_BKGSH, k_BKSH, v_BKSH, segments_BS, out_BKGSH, lse_BKGS)


def _backward(window, residuals, grad_BKGSH):
    q_BKGSH, k_BKSH, v_BKSH, segments_BS, out_BKGSH, lse_BKGS = residuals
    batch, kv_heads, group, length, head_dim = q_BKGSH.shape
    delta_BKGS = jnp.sum(grad_BKGSH.astype(jnp.float32) * out_BKGSH.astype(jnp.float32), axis=-1)
    # Transposed: the products below then turn only their small operand.
    dk_BKHS = jnp.zeros((batch, kv_heads, head_dim, length), jnp.float32)
    dv_BKHS = jnp.zeros((batch, kv_heads, head_dim, length), jnp.float32)
    dqs = []
    for block in _blocks(length, window):
        cut, seen = slice(block.start, block.stop), slice(block.first_key, block.stop)
        scores_BKGCT = _scores(q_BKGSH, k_BKSH, segments_BS, block, window)
        weights_BKGCT = jnp.exp(scores_BKGCT - lse_BKGS[:, :, :, cut, None])
        q_BKRH, grad_BKRH = _rows(q_BKGSH[:, :, :, cut]), _rows(grad_BKGSH[:, :, :, cut])
        dweights_BKRT = _product(grad_BKRH, jnp.swapaxes(v_BKSH[:, :, seen], 2, 3))
        dscores_BKRT = _rows(weights_BKGCT) * (dweights_BKRT - delta_BKGS[:, :, :, cut].reshape(batch, kv_heads, -1, 1))
        dscores_BKRT = (dscores_BKRT * head_dim**-0.5).astype(q_BKGSH.dtype)
        weights_BKRT = _rows(weights_BKGCT).astype(q_BKGSH.dtype)
        dqs.append(_product(dscores_BKRT, k_BKSH[:, :, seen]).reshape(batch, kv_heads, group, -1, head_dim))
        dk_BKHS = dk_BKHS.at[..., seen].add(_product(jnp.swapaxes(q_BKRH, 2, 3), dscores_BKRT))
        dv_BKHS = dv_BKHS.at[..., seen].add(_product(jnp.swapaxes(grad_BKRH, 2, 3), weights_BKRT))
    dq_BKGSH = jnp.concatenate(dqs, axis=3).astype(q_BKGSH.dtype)
    dk_BKSH = jnp.swapaxes(dk_BKHS, 2, 3).astype(k_BKSH.dtype)
    return dq_BKGSH, dk_BKSH, jnp.swapaxes(dv_BKHS, 2, 3).astype(v_BKSH.dtype), None


_attention.defvjp(_forward, _backward)


def _blocks(length: int, window: int | None) -> list[_Block]:
    size = max(BLOCK, -(-length // MOST_BLOCKS))
    starts = range(0, length, size)
    return [_Block(s, min(s + size, length), 0 if window is None else max(0, s - window + 1)) for s in starts]


def _scores(q_BKGSH, k_BKSH, segments_BS, block, window):
    q_BKGCH = q_BKGSH[:, :, :, block.start : block.stop]
    k_BKHT = jnp.swapaxes(k_BKSH[:, :, block.first_key : block.stop], 2, 3)
    scores_BKGCT = _product(_rows(q_BKGCH), k_BKHT).reshape(*q_BKGCH.shape[:-1], -1)
    queries_C1 = jnp.arange(block.start, block.stop)[:, None]
    keys_T = jnp.arange(block.first_key, block.stop)
    mask_CT = keys_T <= queries_C1
    if window is not None:
        mask_CT &= keys_T > queries_C1 - window
    query_segments_BC1 = segments_BS[:, block.start : block.stop, None]
    mask_BCT = mask_CT & (query_segments_BC1 == segments_BS[:, None, block.first_key : block.stop])
    return jnp.where(mask_BCT[:, None, None], scores_BKGCT * q_BKGSH.shape[-1] ** -0.5, MASKED)


def _rows(x_BKGCX: jax.Array) -> jax.Array:
    return x_BKGCX.reshape(*x_BKGCX.shape[:2], -1, x_BKGCX.shape[-1])


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)
